"""How alike two sets of features are: distance, retrieval, linear CKA, and a plane to look at.

Plain functions of arrays: rows are prompts, columns are channels, and whatever network made them is
not asked. Features of different blocks, models or widths can be compared by CKA; the others need
one space. All of it is NumPy in float64: a few hundred rows cost milliseconds, and differences of
long vectors need the digits.
"""

import dataclasses

import numpy as np

from eru_jax.errors import UserError

# Fewer rows have no unbiased HSIC, and so no `linear_cka`.
CKA_ROWS = 4


def _rows(x: np.ndarray) -> np.ndarray:
  x = np.asarray(x, np.float64)
  if x.ndim != 2 or not len(x):
    raise UserError(f'Features are of shape {x.shape}, but must be (N, W) with a row at least.')
  return x


def _alike(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  x, y = _rows(x), _rows(y)
  if x.shape != y.shape:
    raise UserError(f'Features of shapes {x.shape} and {y.shape} are not row by row of one space.')
  return x, y


def distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
  """Euclidean distances between all rows of x (N, W) and y (M, W): (N, M)."""
  x, y = _rows(x), _rows(y)
  # Seen from their middle, so that squares of a common offset do not eat the digits.
  middle = y.mean(0)
  x, y = x - middle, y - middle
  squares = np.square(x).sum(1)[:, None] + np.square(y).sum(1) - 2 * x @ y.T
  return np.sqrt(np.maximum(squares, 0))


def typical_distance(anchors: np.ndarray) -> float:
  """Mean distance between different rows of anchors (A, W): the unit of `relative_distance`.

  Raises:
    UserError: for fewer than two rows.
  """
  count = len(_rows(anchors))
  if count < 2:
    raise UserError('There is one anchor only, so no distance between different ones: add some.')
  return float(distances(anchors, anchors)[np.triu_indices(count, 1)].mean())


def relative_distance(features: np.ndarray, own: np.ndarray, unit: float) -> float:
  """Mean distance of features (N, W) to their own anchors' (N, W), in units of `unit`.

  0 is on the anchor. A feature that says nothing lies in the middle of all anchors, about 0.7 away
  where they spread in many directions alike; `central_distance` says how far exactly.
  """
  features, own = _alike(features, own)
  return _in_units(np.linalg.norm(features - own, axis=1).mean(), unit)


def central_distance(anchors: np.ndarray, unit: float) -> float:
  """Mean distance of anchors (A, W) to their middle, in units of `unit`."""
  anchors = _rows(anchors)
  return _in_units(np.linalg.norm(anchors - anchors.mean(0), axis=1).mean(), unit)


def _in_units(distance: float, unit: float) -> float:
  return float(distance / unit) if unit > 0 else float('nan')


def retrieval(features: np.ndarray, anchors: np.ndarray, own: np.ndarray) -> np.ndarray:
  """Whether the nearest of all anchors is a feature's own, (N,) bool.

  Args:
    features: (N, W); several of them may have the same anchor.
    anchors: (A, W).
    own: (N,) int, the row of each feature's anchor.

  Raises:
    UserError: if `own` is no row of `anchors`, or not one a feature.
  """
  features, anchors = _rows(features), _rows(anchors)
  own = np.asarray(own)
  if own.shape != (len(features),) or own.min() < 0 or own.max() >= len(anchors):
    raise UserError(
      f'Anchors of {len(features)} features must be as many rows below {len(anchors)}, not {own}.'
    )
  between = distances(features, anchors)
  # Strictly: where all anchors coincide, nothing has been found.
  rivals = between.copy()
  rivals[np.arange(len(own)), own] = np.inf
  return between[np.arange(len(own)), own] < rivals.min(1)


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
  """Similarity of the structure of x (N, W) and y (N, V): linear CKA, without its bias.

  Centred kernel alignment (Kornblith et al., Similarity of Neural Network Representations
  Revisited, 2019) compares which rows are alike within x with which are within y; it does not see
  rotations, offsets and scale. With the usual estimator of its HSIC, features of many channels are
  alike however unrelated they are, 0.6 with 128 rows of 192 independent channels; the unbiased one
  (Song et al., Feature Selection via Dependence Maximization, 2012; for CKA: Nguyen et al., 2021)
  makes that 0 on average, and single values may be slightly negative.

  Returns:
    1 for the same structure, about 0 for unrelated ones; NaN for fewer than four rows, or where all
    rows are equal.

  Raises:
    UserError: if x and y have different numbers of rows.
  """
  x, y = _rows(x), _rows(y)
  if len(x) != len(y):
    raise UserError(f'CKA compares features of the same prompts, not of {len(x)} and {len(y)}.')
  if len(x) < CKA_ROWS:
    return float('nan')
  # Centring changes no exact result, but keeps the digits.
  x, y = (_gram(z - z.mean(0)) for z in (x, y))
  scale = _hsic(x, x) * _hsic(y, y)
  return float(_hsic(x, y) / np.sqrt(scale)) if scale > 0 else float('nan')


def _gram(x: np.ndarray) -> np.ndarray:
  gram = x @ x.T
  np.fill_diagonal(gram, 0)
  return gram


def _hsic(x: np.ndarray, y: np.ndarray) -> float:
  """Unbiased HSIC of two Gram matrices with empty diagonals, up to a factor of their size."""
  n = len(x)
  return (
    np.sum(x * y)
    + x.sum() * y.sum() / ((n - 1) * (n - 2))
    - 2 / (n - 2) * np.dot(x.sum(0), y.sum(0))
  )


@dataclasses.dataclass(frozen=True)
class Plane:
  """The plane that shows the most of a cloud of points.

  Attributes:
    middle: (W,) the cloud's mean.
    axes: (W, 2) orthonormal directions.
    explained: (2,) share of the cloud's variance along each.
  """

  middle: np.ndarray
  axes: np.ndarray
  explained: np.ndarray

  def project(self, x: np.ndarray) -> np.ndarray:
    """Coordinates (N, 2) of features (N, W) in the plane."""
    return (_rows(x) - self.middle) @ self.axes


def principal_plane(x: np.ndarray) -> Plane:
  """The first two principal components of x (N, W).

  Their signs are fixed (the largest entry of an axis is positive), so that the same features give
  the same picture on every machine.

  Raises:
    UserError: if there are fewer than two channels.
  """
  x = _rows(x)
  if x.shape[1] < 2:
    raise UserError('Features of one channel lie on a line: there is no plane to show.')
  middle = x.mean(0)
  _, lengths, axes = np.linalg.svd(x - middle, full_matrices=len(x) < 2)
  lengths = np.append(lengths, 0)
  axes = axes[:2] * np.sign(axes[np.arange(2), np.abs(axes[:2]).argmax(1)])[:, None]
  total = np.square(lengths).sum()
  return Plane(middle, axes.T, np.square(lengths[:2]) / (total if total > 0 else 1))
