"""A model that is asked over HTTP, with what it is told and what it costs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from eru_jax.judges.chat import ChatClient


@dataclasses.dataclass(frozen=True)
class Service:
  """A model that is asked over HTTP.

  Attributes:
    client: sends the requests.
    instructions: file to use in place of ours; '' for ours.
    price: of a million tokens, read and written, see `summary.parse_price`; None if unknown.
  """

  client: ChatClient
  instructions: str = ''
  price: tuple[float, float] | None = None

  def to_json(self) -> Mapping[str, Any]:
    """Who it is; never its key."""
    config = self.client.config
    return {
      'model': config.model,
      'url': config.url,
      'instructions': self.instructions or None,
      'price': list(self.price) if self.price else None,
    }
