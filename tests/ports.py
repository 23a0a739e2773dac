"""Ports of this machine for servers that come late, or come and go, while other tests run."""

import socket
import sys

_held = []


def reserve():
  """A port of 127.0.0.1 at which nobody answers until somebody listens at this very one.

  A port that was only looked up may be given to another process before it is used. This one stays
  bound until the tests are over, without listening: Linux gives it to nobody who asks for any
  port, and lets those listen that name it and reuse addresses, as servers do.
  """
  holder = socket.socket()
  holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  holder.bind(('127.0.0.1', 0))
  port = holder.getsockname()[1]
  if sys.platform == 'linux':
    _held.append(holder)
  else:  # would refuse the others, or answer in their place
    holder.close()
  return port
