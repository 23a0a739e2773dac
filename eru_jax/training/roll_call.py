"""Where each process of a run is, by what it says of itself: who is behind, and who is gone."""

import json
import re
import time
from collections.abc import Callable, Iterator

import jax

from eru_jax import distributed
from eru_jax.errors import causes

# Every process says where it is so often, at least; one that misses it twice may be gone.
SAY_EVERY = 5.0
# So long nothing is heard of a process before the others tell. JAX's runtime gives it up after
# 100 s, with a dump of the stack in which nobody is named.
_SILENT = 60.0
# What XLA's collectives (Gloo on CPUs, NCCL on GPUs) and JAX's runtime say of broken connections.
_BROKEN = re.compile(
  r'gloo|nccl|connection (closed|reset|refused)|broken pipe|socket closed|heartbeat|unavailable'
  r'|coordination ?service|failed to connect|another task died',
  re.IGNORECASE,
)
# How the runtime begins its messages.
_STATUS = re.compile('[A-Z_]+: ')


def is_broken_connection(error: BaseException) -> bool:
  """Whether an error may say no more than that others cannot be reached."""
  return any(_is_of_runtime(cause) and _BROKEN.search(str(cause)) for cause in causes(error))


def _is_of_runtime(error: BaseException) -> bool:
  if isinstance(error, jax.errors.JaxRuntimeError):
    return True
  # Raised by a program that had been compiled before, it is of another type.
  return type(error) is ValueError and _STATUS.match(str(error)) is not None


class Store:
  """The part below a prefix of the key-value store of JAX's runtime, which process 0 keeps.

  All of it raises jax.errors.JaxRuntimeError when process 0 is gone.
  """

  def __init__(self, prefix: str):
    self._prefix = prefix

  def set(self, key: str, value: str, overwrite: bool = True) -> None:
    distributed.client().key_value_set(f'{self._prefix}/{key}', value, overwrite)

  def get(self, key: str) -> str | None:
    """A value, or None if there is none."""
    try:
      return distributed.client().key_value_try_get(f'{self._prefix}/{key}')
    except jax.errors.JaxRuntimeError as error:
      if 'NOT_FOUND' in str(error):
        return None
      raise

  def wait(self, key: str, milliseconds: int) -> str:
    """A value, once there is one."""
    return distributed.client().blocking_key_value_get(f'{self._prefix}/{key}', milliseconds)

  def list(self, key: str) -> dict[int, str]:
    """Values of KEY/0, KEY/1...: those that there are."""
    found = distributed.client().key_value_dir_get(f'{self._prefix}/{key}/')
    return {int(name.rpartition('/')[2]): value for name, value in found}


class RollCall:
  """`say` regularly; the rest asks what all have said."""

  def __init__(self, store: Store):
    self._store = store
    self._said: dict[int, str] = {}
    # By this machine's clock: when each was last found to have said something new.
    self._heard: dict[int, float] = {}

  def say(self, done: int, where: str) -> None:
    """Tells the others how far this process is.

    Args:
      done: iterations, decisions and the like so far, which all processes count alike.
      where: what the last of them said of itself.
    """
    # The time makes each word a new one.
    self._store.set(f'at/{jax.process_index()}', json.dumps([done, where, time.time()]))

  def listen(self) -> None:
    """Takes in what all have said since."""
    now, said = time.monotonic(), self._store.list('at')
    for index, value in said.items():
      if self._said.get(index) != value:
        self._heard[index] = now
    self._said = said

  def behind(self, patience: float) -> Iterator[str]:
    """Who is not as far as the others, or says nothing.

    Args:
      patience: seconds without a word that mean nothing yet.
    """
    self.listen()
    found = {index: json.loads(value) for index, value in self._said.items()}
    newest, furthest, _ = max(found.values())
    for index in range(jax.process_count()):
      if index not in found:
        yield f'process {index} has never been heard of'
        continue
      done, where, _ = found[index]
      if done < newest:
        others = f'others at {furthest}' if furthest != where else 'others are waiting further on'
        yield f'process {index} is still at {where}, {others}'
      if (silent := self._silent(index)) > max(30.0, patience):
        yield f'process {index} was last heard of {silent:.0f} s ago'

  def where(self) -> str:
    """Where this process said it is."""
    return json.loads(self._said[jax.process_index()])[1]

  def silent(self) -> Iterator[tuple[int, str]]:
    """Who has said nothing for so long that they may be gone: indices, and words."""
    self.listen()
    for index in self._said:
      if (silent := self._silent(index)) > _SILENT:
        yield index, f'process {index} was last heard of {silent:.0f} s ago'

  def gone(self, wait: float, check: Callable[[], None]) -> list[str]:
    """Who says nothing while the others go on saying where they are.

    Args:
      wait: seconds in which everybody who is alive says something.
      check: called every now and then meanwhile; what it raises ends this.
    """
    self.listen()
    before, deadline = dict(self._said), time.monotonic() + wait
    while time.monotonic() < deadline:
      check()
      time.sleep(min(0.5, wait / 4))
    self.listen()
    words = []
    for index in range(jax.process_count()):
      if index not in self._said:
        words.append(f'process {index} has never been heard of')
      elif self._said[index] == before.get(index):
        said = json.loads(self._said[index])[2]
        # The other machine's clock may be another.
        silent = max(time.time() - said, self._silent(index))
        words.append(f'process {index} was last heard of {silent:.0f} s ago')
    return words

  def _silent(self, index: int) -> float:
    return time.monotonic() - self._heard[index]
