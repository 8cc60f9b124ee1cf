"""Failed first attempts: the failure bank, and what gives each training step its failures."""
