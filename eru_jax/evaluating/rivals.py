"""The rival at inference, as part of an evaluation: prompts rewritten, and what each took."""

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from eru_jax.errors import UserError
from eru_jax.judges import verdicts
from eru_jax.judges.rewriting import Rewrite, rewrite_prompts
from eru_jax.judges.service import Service
from eru_jax.judges.summary import Summary
from eru_jax.training.progress import Progress

# The condition of its prompts.
REWRITTEN = 'rewritten'


class Rewriting:
  """Rewrites an evaluation's prompts, each once: rewrites.jsonl keeps them."""

  def __init__(self, service: Service, output: pathlib.Path):
    self._service, self._path = service, output / 'rewrites.jsonl'
    self._rewrites: list[Rewrite] = []
    self._summary: Summary | None = None

  def __call__(self, prompts: Sequence[str]) -> list[str | None]:
    """The prompts in other words, None for those that stay without.

    Raises:
      UserError: as `rewrite_prompts`, or if none could be rewritten.
    """
    service, unique = self._service, len(set(prompts))
    with verdicts.open_journal(self._path) as journal, Progress(unique, 'prompts') as progress:
      self._rewrites, self._summary = rewrite_prompts(
        service.client,
        prompts,
        journal,
        service.instructions,
        service.price,
        lambda done, _: progress.update(done),
      )
    if not self._summary.answered:
      config, reason = service.client.config, next(iter(self._summary.reasons), 'no prompts')
      raise UserError(
        f'The rewriter {config.model!r} at {config.url} rewrote none of {unique} prompts '
        f'({reason}): see that it runs and answers as asked, or leave --rewriter out.'
      )
    return [rewrite.text for rewrite in self._rewrites]

  def told(self) -> Mapping[str, Any]:
    """What it came to, all together and for one prompt: seconds, tokens and, with prices, cost.

    Tokens and costs are means over the prompts whose tokens the server counted, 'metered' of them.
    """
    done = [rewrite for rewrite in self._rewrites if rewrite.text is not None]
    each = [self._one(rewrite) for rewrite in done]
    means: dict[str, float] = {}
    for name in each[0] if each else ():
      there = [one[name] for one in each if one[name] is not None]
      if there:
        means[name] = statistics.fmean(there)
    if each:
      means['median_seconds'] = statistics.median(one['seconds'] for one in each)
      means |= {'prompts': len(each), 'metered': sum(one.metered for one in done)}
    return {
      **self._service.to_json(),
      'condition': REWRITTEN,
      'total': self._summary.to_json(),
      'per_prompt': means,
    }

  def by_prompt(self) -> dict[str, dict[str, Any]]:
    """Prompt -> its seconds, tokens and cost; without those that stayed as they were."""
    return {one.prompt: self._one(one) for one in self._rewrites if one.text is not None}

  def _one(self, rewrite: Rewrite) -> dict[str, Any]:
    price, known = self._service.price, rewrite.metered
    tokens = (rewrite.prompt_tokens, rewrite.completion_tokens)
    cost = sum(n * each for n, each in zip(tokens, price or (0, 0), strict=True)) / 1e6
    return {
      'seconds': rewrite.seconds,
      'prompt_tokens': tokens[0] if known else None,
      'completion_tokens': tokens[1] if known else None,
      'cost': cost if known and price is not None else None,
    }
