"""What programs for GPUs and TPUs are made of, run on the CPU."""


def choose_for(platform):
    """What stands in for `jax.lax.platform_dependent`: the branch of ``platform``, on any."""

    def choose(*args, default=None, **branches):
        return branches.get(platform, default)(*args)

    return choose
