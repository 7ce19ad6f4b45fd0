"""Verdicts on what a model wrote, by a library that might never return: in a process of its own.

`9**9**9**9` keeps sympy busy for ever, and a scorer may evaluate what it is given. So a verdict is
reached in another process, whose time and memory are bounded by the system: a question that takes
longer ends it, gets no answer, and the next question starts a new one. Time is that of the
processor, so that a busy machine judges alike, and ten times as much on the clock. Works in any
thread. The process ends with `release`, with its parent, however that ends, or by its own limit.
POSIX only.
"""

import json
import os
import subprocess
import sys
import threading
import weakref

import envs

START_SECONDS = 300  # to import what the code needs
SERVER = """
import json, os, resource, signal, sys
sys.path = [place for place in sys.path if place]  # no file of the current directory is imported
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what a library prints is no answer
folder, file, seconds, megabytes, start = sys.argv[1:]
signal.alarm(int(start))  # nobody handles it: the system ends the process
sys.path.insert(0, folder)
import envs
verdict = envs.load(envs.FOLDER / f"{file}.py", f"worlds.{file}").verdict_function()
resource.setrlimit(resource.RLIMIT_AS, (int(megabytes) << 20,) * 2)
print(json.dumps("ready"), file=answers, flush=True)
signal.alarm(0)
def limit(seconds):
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)
for line in sys.stdin:
    limit(float(seconds))
    try:
        found = verdict(*json.loads(line))
    except Exception:
        found = None
    limit(0)
    print(json.dumps(found), file=answers, flush=True)
"""


class Judge:
    """Answers questions as the function does that `verdict_function` of worlds/FILE.py returns."""

    def __init__(self, file, seconds=5.0, megabytes=4096):
        """`seconds` of a processor per question, `megabytes` of address space."""
        given = str(envs.FOLDER.parent), file, str(seconds), str(megabytes), str(START_SECONDS)
        self.command = [sys.executable, "-c", SERVER, *given]
        self.lock, self.users = threading.Lock(), weakref.WeakSet()
        self.process, self.owner = None, 0

    def ask(self, *question):
        """The verdict, of JSON's types as its question; None where it raised or took too long.

        RuntimeError where the process does not start.
        """
        line = json.dumps(question) + "\n"
        with self.lock:
            for _ in range(2):  # the process of the first try may have been ended by somebody
                self.start()
                try:
                    self.process.stdin.write(line)
                    self.process.stdin.flush()
                    break
                except OSError:
                    self.stop()
            answer = self.process.stdout.readline() if self.process else ""
            if not answer.endswith("\n"):
                self.stop()
                return None
            return json.loads(answer)

    def start(self):
        """A process of our own: one that a fork inherited answers its parent."""
        if self.process and self.owner == os.getpid():
            return
        self.process = subprocess.Popen(
            self.command,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},  # threads take room
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for whoever asks, who may still finish a step
        )
        self.owner = os.getpid()
        if not self.process.stdout.readline().endswith("\n"):
            self.stop()
            raise RuntimeError("the judge did not start: see its error above")

    def stop(self):
        """Ends the process."""
        if self.process and self.owner == os.getpid():
            self.process.kill()
            self.process.communicate()  # waits, and closes the pipes
        self.process = None

    def hold(self, world):
        """The process is kept until the last world that holds it has released it."""
        self.users.add(world)

    def release(self, world):
        """See `hold`; harmless if repeated."""
        self.users.discard(world)
        if not self.users:
            with self.lock:
                self.stop()
