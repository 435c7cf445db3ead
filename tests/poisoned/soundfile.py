"""soundfile with holes: put before the real one, it does what the first bytes of a file say."""

import importlib.util
import os
import signal
import sys
import time

_here = os.path.dirname(os.path.abspath(__file__))
_paths = [path for path in sys.path if os.path.abspath(path or ".") != _here]
_found = importlib.machinery.PathFinder.find_spec("soundfile", _paths)
assert _found is not None
assert _found.loader is not None
_real = importlib.util.module_from_spec(_found)
_found.loader.exec_module(_real)
globals().update({name: value for name, value in vars(_real).items() if name[:2] != "__"})


def SoundFile(file, *arguments, **options):
    """The real one, unless the file says otherwise."""
    order = file.read(5)
    file.seek(0)
    if order == b"HANG!":
        time.sleep(3600)
    elif order == b"SPIN!":
        while True:
            pass
    elif order == b"CRASH":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif order == b"GROW!":
        held = []
        while True:
            held.append(bytearray(2**24))
    elif order == b"LIAR!":
        os.closerange(3, 64)  # without a word
        os._exit(0)
    elif order == b"WRITE":
        with open(os.environ["POISON_WRITES"], "wb") as out:
            out.write(order)
    return _real.SoundFile(file, *arguments, **options)
