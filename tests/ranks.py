"""Processes that the tests share: started once for a file, given one function after the other."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

SECONDS = 120
"""After which a rank that waits for another one gives up."""


class Ranks:
    """P processes in one gloo group.

    They are forked from a server that has imported `preload`, so torch is imported once for all of them.

    Args:
        size: P.
        preload: the module whose functions they run.
    """

    def __init__(self, size: int, preload: str) -> None:
        context = multiprocessing.get_context("forkserver")
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the server knows no other way to find what it preloads
        context.set_forkserver_preload([preload])
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, there), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Let every process call `function(rank, *arguments)`."""
        for pipe in self.pipes:
            pipe.send((function, arguments))

    def results(self) -> list[Any]:
        """What the processes returned, an error for those that raised one, and None for those that are gone."""
        return [_received(pipe) for pipe in self.pipes]

    def first(self) -> Any:
        """What the first process returned."""
        return _received(self.pipes[0])

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(rank, *arguments)` returns in every process."""
        self.start(function, *arguments)
        results = self.results()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return results

    def close(self) -> None:
        """End the processes."""
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.join(2)
            if process.is_alive():
                process.kill()


def _received(pipe: Connection) -> Any:
    try:
        return pipe.recv()
    except (EOFError, ConnectionResetError):
        return None


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=SECONDS))
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            break
        try:
            with torch.no_grad():
                result = function(rank, *arguments)
        except Exception as error:
            traceback.print_exc()
            result = error
        pipe.send(result)
    os._exit(0)  # not to wait for processes that are gone
