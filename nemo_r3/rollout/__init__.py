"""The rollout: vLLM engines and the scheduler that turns failures into reflections, retries and rewards."""
