"""A machine that is busy with other things makes no test fail."""

from hypothesis import HealthCheck, settings

settings.register_profile("mooncake", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("mooncake")
