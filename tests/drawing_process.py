"""One process of commands that draw, as a test wants it.

    python tests/drawing_process.py JSON

JSON is a list of [command, fields of its request], done one after the other; or what `stand_ins`
is told.
"""

import dataclasses
import json
import os
import pathlib
import signal
import sys
import zlib

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from eru_jax import distributed
from eru_jax.evaluating import drawing
from eru_jax.evaluating.evaluator import evaluate
from eru_jax.evaluating.request import EvaluationRequest
from eru_jax.judges.chat import ChatClient
from eru_jax.judges.service import Service
from eru_jax.judges.settings import ChatConfig
from eru_jax.training.sampling import SampleRequest, sample
from eru_jax.training.watch import rest, tick


def _request(kind, values):
  return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def do(commands):
  for command, values in commands:
    if command == 'sample':
      sample(_request(SampleRequest, values))
    else:
      evaluate(_request(EvaluationRequest, values))


def _service(url, role):
  return Service(ChatClient(ChatConfig(url, 'tiny-judge', role=role, concurrency=1)))


def stand_ins(wanted):
  """Evaluates the stand-ins of test_evaluator.py, whose pictures cost nothing.

  Args:
    wanted: `request`, its fields; `judge` and `rewriter`, their addresses; `place`, where models
      are; `kill_at`, the picture after which process 1 is gone.
  """
  from test_evaluator import Studio

  def draw(experiment, snapshot, judge, prompts, noise):
    # As devices do that share a program: none gets on alone, and all are given the same.
    given = zlib.crc32(json.dumps(prompts).encode() + np.asarray(noise).tobytes())
    (seen,) = multihost_utils.process_allgather(np.array([given], np.uint32), tiled=True)[:1]
    assert seen == given
    drawn = studio.draw(experiment, snapshot, judge, prompts, noise)
    tick(f'picture {len(prompts)} of {len(prompts)}')
    rest()
    if jax.process_index() == 1 and len(studio.drawn) >= wanted.get('kill_at', 10**9):
      os.kill(os.getpid(), signal.SIGKILL)
    return drawn

  request = _request(EvaluationRequest, wanted['request'])
  if distributed.is_main():
    services = {role: _service(wanted[role], role) for role in ('judge', 'rewriter')}
    request = dataclasses.replace(request, **services)
  else:  # without a disk, questions and network
    request = dataclasses.replace(request, output='/proc/nowhere/out', data='/nowhere')
  with pytest.MonkeyPatch.context() as patch:
    studio = Studio(patch, pathlib.Path(wanted['place']))
    patch.setattr(drawing, 'draw', draw)
    evaluate(request)
  print(f'{len(studio.drawn)} drawn')


def main(wanted):
  distributed.initialize()
  if isinstance(wanted, list):
    do(wanted)
  else:
    stand_ins(wanted)


if __name__ == '__main__':
  from eru_jax import commands

  sys.argv, arguments = sys.argv[:1], sys.argv[1:]
  commands.run(lambda: main(json.loads(arguments[0])))
