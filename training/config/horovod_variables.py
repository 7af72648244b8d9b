"""The settings of Horovod, which it reads from its environment when it starts."""

from training.errors import ConfigError

from .schema import DistributedConfig

_MIB = 1 << 20


def horovod_variables(distributed: DistributedConfig) -> dict[str, str]:
    """Return the variables of the settings that are not null. They replace those that the launcher was given."""
    values = {
        "HOROVOD_CYCLE_TIME": distributed.horovod_cycle_ms,
        "HOROVOD_FUSION_THRESHOLD": None
        if distributed.horovod_fusion_mib is None
        else round(distributed.horovod_fusion_mib * _MIB),
        "HOROVOD_CACHE_CAPACITY": distributed.horovod_cache,
        "HOROVOD_HIERARCHICAL_ALLREDUCE": None
        if distributed.horovod_hierarchical is None
        else int(distributed.horovod_hierarchical),
        "HOROVOD_TIMELINE": distributed.horovod_timeline,
    }
    return {name: str(value) for name, value in values.items() if value is not None}


def check_horovod(distributed: DistributedConfig, backend: str) -> None:
    """Raise ConfigError if a setting of Horovod would have no effect, because the backend is another one."""
    if backend in ("auto", "horovod"):
        return
    for key, value in vars(distributed).items():
        if key.startswith("horovod_") and value is not None:
            raise ConfigError(
                f"distributed.{key}={value} is a setting of Horovod, and the backend is {backend}. Fix: distributed.{key}=null, or "
                "start the job with Horovod (distributed=horovod)"
            )
