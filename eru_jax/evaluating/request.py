"""What an evaluation is asked for."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from eru_jax.judges.service import Service

# Other words for prompts: None for one that could not be rewritten.
Rewriter = Callable[[Sequence[str]], Sequence[str | None]]


@dataclasses.dataclass(frozen=True)
class EvaluationRequest:
  """The flags of `evaluate`, see there.

  Attributes:
    judge: looks at the pictures, if it is asked over HTTP.
    rewriter: makes prompts of the implicit ones, over HTTP: as `rewriters`.
    rewriters: condition -> what makes its prompts of the implicit ones. They are drawn with the
      first model alone, as a rival of the others.
  """

  models: tuple[str, ...]
  output: str
  benchmark: str = 'emoji'
  data: str | None = None
  scorer: str | None = None
  scorer_model: str | None = None
  limit: int | None = None
  images_per_prompt: int | None = None
  conditions: tuple[str, ...] = ()
  stages: tuple[str, ...] = ()
  seed: int = 0
  mesh: str | None = None
  steps: int | None = None
  guidance: float | None = None
  cfg_scale: float | None = None
  height: int | None = None
  width: int | None = None
  dtype: str | None = None
  batch_size: int | None = None
  judge: Service | None = None
  rewriter: Service | None = None
  rewriters: Mapping[str, Rewriter] = dataclasses.field(default_factory=dict)
