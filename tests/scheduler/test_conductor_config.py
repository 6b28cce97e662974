"""What the user configures, as the Conductor gets it."""

from mooncake.config import Config, SloConfig
from mooncake.core.types import NANOS_PER_MS, NANOS_PER_S
from mooncake.scheduler.config import ConductorConfig, RolesConfig
from mooncake.scheduler.service import conductor_config


def test_copies_and_changes_of_roles_are_off_unless_asked_for() -> None:
    assert conductor_config(Config()) == ConductorConfig(num_queued_max=Config().limits.queue)
    settings = conductor_config(Config(replicate="on", switch_roles="on"))
    assert (settings.replicate, settings.switch_roles) == (True, True)


def test_pools_are_measured_by_the_objectives() -> None:
    settings = conductor_config(Config(slo=SloConfig(ttft_s=0.5, tbt_s=0.05)))
    assert (settings.roles.ttft_ns, settings.roles.tbt_ns) == (NANOS_PER_S // 2, 50 * NANOS_PER_MS)
    assert conductor_config(Config(slo=SloConfig(ttft_s=2))).roles.tbt_ns == RolesConfig().tbt_ns
