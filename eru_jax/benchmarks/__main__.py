"""Makes a prompt file of a benchmark's pairs, without whatever is near a test set.

    python -m eru_jax.benchmarks --benchmark=science_t2i --data=Science-T2I-Trainset \\
      --held_out=science_t2i=Science-T2I-S --held_out=wise=WISE --held_out=wise_verified=WISE \\
      --output=science.jsonl
    python -m eru_jax.train --config=configs/flux_dev_dk_dm.py --config.data.pairs=science.jsonl \\
      --workdir=runs/science

A training set becomes split 'train'; a benchmark that is all for testing becomes a split of its own
name, which a run is asked about and never trains on.
"""

from absl import flags

from eru_jax import commands

_BENCHMARK = flags.DEFINE_string('benchmark', None, 'science_t2i, wise or wise_verified.')
_DATA = flags.DEFINE_string('data', None, "Directory of the benchmark's files, or one file.")
_PAIRS = flags.DEFINE_string(
  'pairs', None, 'Instead of a benchmark: a JSON Lines file of knowledge pairs to filter.'
)
_HELD_OUT = flags.DEFINE_multi_string(
  'held_out', [], 'NAME=DIR of a test set that no training pair may be near; may be repeated.'
)
_THRESHOLD = flags.DEFINE_float(
  'threshold', 0.5, 'Share of common words from which two prompts are near.',
  lower_bound=0.01, upper_bound=1,
)  # fmt: skip
_OUTPUT = flags.DEFINE_string('output', None, 'JSON Lines file to write.')
flags.mark_flags_as_required(['output'])


def main() -> None:
  from eru_jax.benchmarks.conversion import convert

  convert(
    _BENCHMARK.value, _DATA.value, _PAIRS.value, _HELD_OUT.value, _THRESHOLD.value, _OUTPUT.value
  )


if __name__ == '__main__':
  commands.run(main)
