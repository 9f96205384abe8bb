"""Trains a diffusion teacher, or a multistep consistency model from it.

    python -m mcm_jax.train --config=openmoji:teacher --workdir=runs/teacher
    python -m mcm_jax.train --config=openmoji:cd,steps=4 --workdir=runs/cd4 \\
        --config.teacher_checkpoint=runs/teacher

The same command continues an interrupted run. Ctrl-C saves a checkpoint before it stops. To train on several
hosts, start the command on each; see mcm_jax/system/distributed.py and launch/.
"""

import sys

from absl import flags

from mcm_jax.system import command_line, config_files, paths

_CONFIG = config_files.define_flag("openmoji:cd,steps=4")
flags.mark_flag_as_required("config")
_WORKDIR = paths.define_path("workdir", None, "Directory of the run; created if missing.", required=True)
_PROFILE = flags.DEFINE_string(
    "profile",
    None,
    "START,STEPS: trace STEPS updates, after the first START of this invocation, into WORKDIR/profile for "
    "xprof.",
)


def main() -> None:
    """Trains the run that the flags specify."""
    config = command_line.loaded_config(_CONFIG)
    # Slow to import; --help and misspelt flags should not wait for it.
    from mcm_jax.runs import trainer
    from mcm_jax.system import distributed
    from mcm_jax.training.profile import Profile

    workdir = _WORKDIR.value
    profile = None if _PROFILE.value is None else Profile.parse(_PROFILE.value)
    with distributed.joined():
        finished = trainer.train(config, workdir, profile=profile)
        if finished:
            distributed.say(f"finished: {workdir}")
        elif distributed.is_first():
            print(f"stopped and saved: the same command continues {workdir}", file=sys.stderr)
    if not finished:
        sys.exit(130)


if __name__ == "__main__":
    command_line.run(main)
