"""What judges are asked, and what their answers are worth.

| name | asked for | a picture's score |
|---|---|---|
| `wise` | consistency, realism, aesthetics, 0 to 2 each | (0.7 C + 0.2 R + 0.1 A) / 2 |
| `wise_verified` | correct, 0 or 1 | that |
| `science_t2i` | scene, 0 or 1, and reality, 0 to 3, by the rubrics of the row | reality / 3 if the scene is complete, else 0 |

The scales are those of WISE (Niu et al., arXiv:2503.07265), of its verified edition and of the
second version of Science-T2I (Li et al., arXiv:2504.13129). **The instructions are in our own words,
not the authors'**, so absolute scores are not theirs, and differences within one table are what they
are good for. Who has the official text can use it: `read_instructions`.
"""  # noqa: E501

import dataclasses
import difflib
import hashlib
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

from eru_jax.errors import UserError
from eru_jax.judges.replies import integers, quoted, words

_PLACEHOLDER = re.compile(r'\{(\w+)\}')
_LARGEST = 1 << 16  # characters of instructions
_LONGEST_REASON = 300  # characters of a judge's words that are kept for people

_WISE = """\
You judge how well a picture answers a prompt. The prompt asks for something through knowledge, \
without naming it; the explanation says what a right picture has to show.

Prompt: {prompt}
Explanation: {explanation}

Give three marks, each 0, 1 or 2. Be severe: wherever you hesitate, give the lower mark, and keep \
2 for what leaves nothing to be wished for.

consistency: does the picture show what prompt and explanation ask for?
  0 - what is asked for is not there, or contradicted
  1 - it is there in part, or with mistakes
  2 - all of it is there, and right
realism: could this be a photograph?
  0 - it is plainly artificial, or physically impossible
  1 - it is believable, with flaws
  2 - it cannot be told from a photograph
aesthetics: is it a good picture?
  0 - badly composed or unpleasant to look at
  1 - decent, nothing more
  2 - outstanding in composition, colour and style

Answer with one JSON object and nothing else, the marks in place of the dots:
{"consistency": ..., "realism": ..., "aesthetics": ...}
"""

_WISE_VERIFIED = """\
You decide whether a picture gives the right answer to a prompt. The prompt asks for something \
through knowledge, without naming it; the explanation says what a right picture has to show.

Prompt: {prompt}
Explanation: {explanation}

The picture is correct (1) if it shows what the explanation asks for, and shows it clearly enough \
to be sure. It is not (0) if anything essential is missing, wrong or contradicted, or if it is too \
broken to tell. Beauty, style and details that nobody asked for do not count.

Answer with one JSON object and nothing else:
{"reason": "one short sentence", "correct": 0 or 1}
"""

_SCIENCE = """\
You are a scientist who marks the picture that was drawn for a prompt, first its scene and then \
whether nature behaves in it as it should. Go by the two rubrics alone.

Prompt: {prompt}
Rubric of the scene: {scene}
Rubric of reality: {reality}

scene: 1 if the picture meets all of the rubric of the scene, else 0.
reality: the whole number from 0 to 3 that the rubric of reality gives; 0 if scene is 0. Style and \
small things in the background do not count.

Describe what you see before you decide. Answer with one JSON object and nothing else:
{"description": "what the picture shows", "scene": 0 or 1, "reality": 0 to 3}
"""


@dataclasses.dataclass(frozen=True)
class Protocol:
  """A way of judging.

  Attributes:
    name: among PROTOCOLS.
    version: of our code and instructions; verdicts of another one are not reused.
    instructions: what the model is told, with {placeholders}.
    fields: the placeholders there are; instructions must use all of them.
    marks: what it answers with: name -> least and largest whole number.
    score: marks -> the picture's score, from 0 to 1.
    also: mark -> other names of it.
  """

  name: str
  version: int
  instructions: str
  fields: tuple[str, ...]
  marks: Mapping[str, tuple[int, int]]
  score: Callable[[Mapping[str, int]], float]
  also: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

  def ask(self, values: Mapping[str, str]) -> str:
    """The instructions for one picture; only ours are placeholders, not those of the values.

    Raises:
      UserError: if a value is missing.
    """
    return fill(self.instructions, self.fields, values)

  def read(self, reply: str) -> dict[str, int]:
    """The marks of a reply.

    Raises:
      BadReply: if they are not all there, whole and in range.
    """
    return integers(reply, self.marks, self.also)

  def words(self, reply: str) -> str:
    """The reason that a readable reply gives, or what it sees: a line for people, '' for none."""
    return quoted(words(reply), _LONGEST_REASON)

  def identity(self) -> dict[str, Any]:
    """What verdicts depend on."""
    text = hashlib.sha256(self.instructions.encode()).hexdigest()
    return {'protocol': self.name, 'version': self.version, 'instructions': text}


def wise_score(marks: Mapping[str, int]) -> float:
  """(0.7 consistency + 0.2 realism + 0.1 aesthetics) / 2; whole tenths, so that 2, 2, 2 is 1."""
  return (7 * marks['consistency'] + 2 * marks['realism'] + marks['aesthetics']) / 20


def science_score(marks: Mapping[str, int]) -> float:
  """reality / 3, and nothing for a scene that is incomplete."""
  return marks['reality'] / 3 if marks['scene'] else 0.0


PROTOCOLS = {
  'wise': Protocol(
    'wise',
    1,
    _WISE,
    ('prompt', 'explanation'),
    {name: (0, 2) for name in ('consistency', 'realism', 'aesthetics')},
    wise_score,
    {'aesthetics': ('aesthetic_quality', 'aesthetic')},
  ),
  'wise_verified': Protocol(
    'wise_verified',
    1,
    _WISE_VERIFIED,
    ('prompt', 'explanation'),
    {'correct': (0, 1)},
    lambda marks: float(marks['correct']),
    {'correct': ('score',)},
  ),
  'science_t2i': Protocol(
    'science_t2i',
    1,
    _SCIENCE,
    ('prompt', 'scene', 'reality'),
    {'scene': (0, 1), 'reality': (0, 3)},
    science_score,
    {'scene': ('scene_score',), 'reality': ('reality_score',)},
  ),
}


def protocol(name: str, instructions: str | os.PathLike = '') -> Protocol:
  """A protocol by its name.

  Args:
    name: among PROTOCOLS.
    instructions: file of instructions to use in place of ours; '' for ours.

  Raises:
    UserError: if there is no such protocol, or the file is none.
  """
  if name not in PROTOCOLS:
    raise UserError(f'Unknown protocol {name!r} of judging: choose one of {", ".join(PROTOCOLS)}.')
  found = PROTOCOLS[name]
  if not instructions:
    return found
  text = read_instructions(instructions, found.fields)
  return dataclasses.replace(found, instructions=text)


def read_instructions(path: str | os.PathLike, fields: tuple[str, ...]) -> str:
  """Reads instructions from a text file.

  A {word} is a placeholder; other braces, as those of JSON, are text.

  Args:
    path: the file, in UTF-8.
    fields: the placeholders it must have, at least once each; any other is a mistake.

  Raises:
    UserError: if it cannot be read, or its placeholders are others.
  """
  path = pathlib.Path(path).expanduser()
  try:
    text = path.read_text(encoding='utf-8-sig')
  except OSError as error:
    raise UserError(f'{path} cannot be read: {error.strerror or error}.') from error
  except UnicodeDecodeError as error:
    raise UserError(f'{path} is not UTF-8 text: save it as UTF-8.') from error
  known = ', '.join(f'{{{name}}}' for name in fields)
  if len(text) > _LARGEST:
    raise UserError(f'{path} has {len(text)} characters: instructions have at most {_LARGEST}.')
  for name in _PLACEHOLDER.findall(text):
    if name not in fields:
      near = difflib.get_close_matches(name, fields, 1)
      hint = f'did you mean {{{near[0]}}}?' if near else f'there are {known}.'
      raise UserError(f'{path}: unknown placeholder {{{name}}}; {hint}')
  missing = [name for name in fields if f'{{{name}}}' not in text]
  if missing:
    raise UserError(f'{path} lacks {{{missing[0]}}}: instructions need {known}.')
  return text


def fill(text: str, fields: tuple[str, ...], values: Mapping[str, str]) -> str:
  """Puts values in the place of placeholders, all at once: a value's own braces stay.

  Raises:
    UserError: if a value is missing or blank.
  """
  for name in fields:
    value = values.get(name)
    if not isinstance(value, str) or not value.strip():
      asked = str(values.get('prompt', ''))[:80]
      raise UserError(f'The prompt {asked!r} has no {name}, which the judge must be told: add it.')
  return _PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), text)
