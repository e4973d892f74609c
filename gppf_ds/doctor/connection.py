"""One machine of a hostfile, asked over ssh.

No user's words come near the remote shell: its command line is Python with a constant program, and everything else
travels as json over stdin.
"""

from __future__ import annotations

import asyncio
import json
import shlex
import sys
import time
from typing import Any

from gppf_ds.doctor.host import MARK

SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=5")
PROGRAM = (
    "import json, os, sys, time\n"
    f"print({MARK!r} + json.dumps(None), flush=True)\n"
    "job = json.loads(sys.stdin.readline())\n"
    f"print({MARK!r} + json.dumps(time.time()), flush=True)\n"
    "os.environ.update(job['environment'])\n"
    "try:\n"
    "    os.chdir(job['folder'])\n"
    "except OSError as error:\n"
    "    sys.exit('the folder ' + job['folder'] + ' cannot be entered: ' + str(error.strerror))\n"
    "sys.path[:0] = [job['folder'], *os.environ.get('PYTHONPATH', '').split(':')]\n"
    "from gppf_ds.doctor.host import main\n"
    "main(job)\n"
)


class NoAnswerError(Exception):
    """The machine, or what runs there, has gone; says why."""


class Connection:
    """To one machine.

    Args:
        name: of the machine, as in the hostfile.
        limit: seconds for an answer.
    """

    def __init__(self, name: str, limit: float) -> None:
        self.name = name
        self.limit = limit
        self._errors: asyncio.Task[bytes] | None = None

    async def open(self, job: dict[str, Any]) -> float:
        """Starts the program there.

        Returns:
            By how many seconds the machine's clock is ahead of ours.

        Raises:
            NoAnswerError: it did not start.
        """
        command = shlex.join([sys.executable, "-c", f"exec({PROGRAM!r})"])  # of one line, whatever shell reads it
        self.process = await asyncio.create_subprocess_exec(
            *SSH,
            self.name,
            command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=2**24,
        )
        assert self.process.stderr is not None
        self._errors = asyncio.create_task(self.process.stderr.read())
        await self.answer()
        sent = time.time()
        await self.send(job)
        there = float(await self.answer())
        return there - (sent + time.time()) / 2

    async def send(self, message: Any) -> None:
        """Gives it a line."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            await self.process.stdin.drain()
        except OSError:
            pass  # it has ended: the next answer says why

    async def answer(self) -> Any:
        """Its next answer.

        Raises:
            NoAnswerError: it has ended, or takes longer than the limit.
        """
        assert self.process.stdout is not None
        deadline = asyncio.get_running_loop().time() + self.limit
        try:
            async with asyncio.timeout_at(deadline):
                while line := await self.process.stdout.readline():
                    text = line.decode(errors="replace")
                    if text.startswith(MARK):
                        return json.loads(text.removeprefix(MARK))
                raise NoAnswerError(await self._last_words())
        except TimeoutError as error:
            raise NoAnswerError(f"no answer within {self.limit:.0f} s") from error

    async def _last_words(self) -> str:
        assert self._errors is not None
        said = [line for line in (await self._errors).decode(errors="replace").splitlines() if line.strip()]
        return said[-1].strip() if said else f"ssh ended with code {await self.process.wait()}"

    async def close(self) -> None:
        """Ends the program there, which sees the end of its input."""
        if self._errors is None:
            return
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            async with asyncio.timeout(5):
                await self.process.wait()
        except TimeoutError:
            self.process.kill()
            await self.process.wait()
        self._errors.cancel()
