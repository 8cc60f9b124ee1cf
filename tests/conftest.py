"""Settings of all tests."""

from hypothesis import HealthCheck, settings

# two busy cores: how long an example takes says nothing about the code
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")
