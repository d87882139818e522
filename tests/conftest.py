"""Property tests are the same on every machine and in every run: no random seed, no clock."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "semanticgen", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("semanticgen")
