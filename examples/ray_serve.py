"""Many edits behind one address: a Ray Serve deployment with a replica of the model for each device.

    pip install 'hetcache-compile[serve]'
    python examples/ray_serve.py                    # a replica for each GPU, or two on the CPU
    python examples/ray_serve.py --serve            # the same, until Ctrl-C
    curl --data-binary @edit.hetplan 'localhost:8000/?seed=1' -o latents.safetensors

A request is a plan file and a seed. Edits whose plans have equal budgets and steps share a batch: a session takes one
plan for each of its samples.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import tempfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers that it runs

import numpy as np
import ray
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from ray import serve
from safetensors.torch import load, save
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

import hetcache_compile as hetcache

GRID, STEPS = (3, 10, 10), 4
"""Tokens: this model makes one of a frame of 2 x 2 latents."""
BATCH = 4
"""Edits that a device computes at one time."""
WAITING = 64
"""Requests that wait for a replica. What comes then is answered at once, by 503."""
MOST_STEPS = 100


@dataclass(frozen=True)
class Edit:
    """What a client asks for; here noise and text come from a seed."""

    plan: hetcache.Plan
    seed: int

    def __post_init__(self) -> None:
        if self.plan.grid != GRID:
            raise ValueError(f"the plan is for the grid {self.plan.grid}, and this model has {GRID}")
        if len(self.plan.steps) > MOST_STEPS:
            raise ValueError(f"the plan has {len(self.plan.steps)} steps, and at most {MOST_STEPS} are made")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"a seed is from 0 to 2^63 - 1, not {self.seed}")


@dataclass(frozen=True)
class Edited:
    """What a client gets: latents, and who made them, with the edits of which seeds in one batch."""

    latents: torch.Tensor
    replica: str
    batch: list[int]


def model_on(device: str) -> Any:
    """The model, compiled."""
    torch.manual_seed(0)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=32,
        ffn_dim=48, num_layers=2,
    ).to(device).eval()  # fmt: skip
    # Leave `options` out where speed counts: then Inductor compiles the forms.
    return torch.compile(model, backend=hetcache.hetcache_backend, options={"inner": "eager"})


@torch.no_grad()
def latents_of(model: Any, edits: Sequence[Edit], device: str) -> torch.Tensor:
    """Edit a batch."""
    generators = [torch.Generator().manual_seed(edit.seed) for edit in edits]
    latents = torch.stack([torch.randn(4, 3, 20, 20, generator=one) for one in generators]).to(device)
    text = torch.stack([torch.randn(11, 16, generator=one) for one in generators]).to(device)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(len(edits[0].plan.steps))
    with hetcache.session([edit.plan for edit in edits]):
        for at in scheduler.timesteps:
            output = model(latents, timestep=at.expand(len(edits)).to(device), encoder_hidden_states=text).sample
            latents = scheduler.step(output, at, latents).prev_sample
    return latents.cpu()


class Editor:
    """A replica: one model on one device, and the edits that wait for it.

    It forms a batch when the device is free: of the edit that waits longest, and of those that are like it.
    `serve.batch` would answer the edits of a mixed batch together, when the last of them is done.
    """

    def __init__(self, device: str) -> None:
        self.device, self.model = device, model_on(device)
        self.name = f"replica {serve.get_replica_context().replica_id.unique_id}"
        self.waiting: list[tuple[Edit, asyncio.Future[Edited]]] = []
        self.work: asyncio.Task[None] | None = None

    async def __call__(self, request: Request) -> Response:
        """An edit over HTTP."""
        try:
            edit = edit_from(await request.body(), request.query_params.get("seed", ""))
        except ValueError as error:
            return PlainTextResponse(str(error), status_code=400)
        edited = await self.edit(edit)
        headers = {"replica": edited.replica, "batch": json.dumps(edited.batch)}
        return Response(save({"latents": edited.latents}), media_type="application/octet-stream", headers=headers)

    async def edit(self, edit: Edit) -> Edited:
        """An edit by a handle of the deployment."""
        answer = asyncio.get_running_loop().create_future()
        self.waiting.append((edit, answer))
        if self.work is None or self.work.done():
            self.work = asyncio.create_task(self.edit_all())
        return await answer

    async def edit_all(self) -> None:
        """Edit one batch after the other until nobody waits. It is no request's own task, so no client can end it."""
        while batch := self.next_batch():
            edits = [edit for edit, _ in batch]
            answers = [answer for _, answer in batch]
            try:
                # In a thread, so that the replica goes on to take requests, and to say that it lives.
                latents = await asyncio.to_thread(latents_of, self.model, edits, self.device)
            except Exception as error:
                for answer in answers:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            for answer, own in zip(answers, latents, strict=True):
                if not answer.done():
                    answer.set_result(Edited(own, self.name, [edit.seed for edit in edits]))

    def next_batch(self) -> list[tuple[Edit, asyncio.Future[Edited]]]:
        """Take those who wait longest and are alike. A client that went away has cancelled its answer."""
        self.waiting = [one for one in self.waiting if not one[1].cancelled()]
        batch = [one for one in self.waiting if one[0].plan.batch_key == self.waiting[0][0].plan.batch_key][:BATCH]
        self.waiting = [one for one in self.waiting if one not in batch]
        return batch


def edit_from(plan: bytes, seed: str) -> Edit:
    """The edit of a request.

    Raises:
        ValueError: with one sentence for the client.
    """
    if not seed.isdecimal():
        raise ValueError(f"give a seed, such as /?seed=1, not {seed!r}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "body")
        path.write_bytes(plan)
        try:
            return Edit(hetcache.Plan.load(path), int(seed))
        except hetcache.PlanFileError as error:
            raise ValueError(str(error).replace(str(path), "the body")) from error


def deployment(replicas: int, device: str) -> serve.Application:
    """The application: `serve.run` starts it, here or on a cluster."""
    deployed = serve.deployment(
        num_replicas=replicas,
        ray_actor_options={"num_gpus": 1} if device == "cuda" else {"num_cpus": 1},
        max_ongoing_requests=2 * BATCH,  # of a replica: enough to choose a batch from
        max_queued_requests=WAITING,
    )(Editor)
    return deployed.bind(device)


def plan_of(row: int, column: int, size: int) -> hetcache.Plan:
    """A plan for a square mask, by its first corner, in tokens."""
    mask = np.zeros(GRID, dtype=bool)
    mask[:, row : row + size, column : column + size] = True
    return hetcache.Plan.from_mask(mask, GRID, num_inference_steps=STEPS, schedule="FRPR", margin=1.0, multiple=64)


def file_of(plan: hetcache.Plan) -> bytes:
    """What a client sends."""
    with tempfile.TemporaryDirectory() as folder:
        plan.save(Path(folder, "edit.hetplan"))
        return Path(folder, "edit.hetplan").read_bytes()


def post(address: str, plan: bytes, seed: object) -> tuple[int, bytes, Any]:
    """What a server answers to a request: status, body and headers."""
    request = urllib.request.Request(f"{address}/?seed={seed}", data=plan, method="POST")
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, response.read(), response.headers
    except urllib.error.HTTPError as error:
        return error.code, error.read(), error.headers


def try_out(address: str, editor: Any) -> dict[str, Any]:
    """Send edits of two sizes at one time, over HTTP and by the handle, and compare each with the edit alone."""
    squares = [(0, 0, 4), (0, 0, 7), (3, 4, 4), (2, 2, 7), (5, 5, 4), (1, 1, 7), (1, 5, 4), (3, 3, 7), (2, 0, 4)]
    edits = [Edit(plan_of(*square), seed) for seed, square in enumerate(squares)]
    files = [file_of(edit.plan) for edit in edits]
    with ThreadPoolExecutor(len(edits)) as clients:
        by_handle = editor.edit.remote(edits[0])
        answers = list(clients.map(lambda edit, file: post(address, file, edit.seed), edits[1:], files[1:]))
    edited = [by_handle.result()]
    edited += [Edited(load(body)["latents"], said["replica"], json.loads(said["batch"])) for _, body, said in answers]

    model, found = model_on("cpu"), []
    for edit, one in zip(edits, edited, strict=True):
        alone = latents_of(model, [edit], "cpu")[0]
        error = float((one.latents - alone).abs().max() / alone.abs().max())
        print(f"edit {edit.seed}, M = {edit.plan.num_active}: {one.replica}, with {one.batch}; to alone: {error:.1e}")
        found.append({"active": edit.plan.num_active, "replica": one.replica, "batch": one.batch, "error": error})
    refused = []
    other = hetcache.Plan.from_mask(np.ones((1, 4, 4), dtype=bool), (1, 4, 4), num_inference_steps=STEPS)
    for plan, seed in ((b"no plan", 1), (file_of(other), 1), (files[0], "x")):
        status, body, _ = post(address, plan, seed)
        print(f"refused: {status} {body.decode()}")
        refused.append([status, body.decode()])
    return {"edits": found, "refused": refused}


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Print which replica made which edits, and how far they are from an edit alone; the same as a dict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--port", type=int, default=8000, help="of HTTP; 0: any that is free")
    parser.add_argument("--serve", action="store_true", help="serve until Ctrl-C")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    port = options.port or free_port()

    # Ray of its own, on this machine. For a cluster: ray.init(address="auto").
    # Replicas look for modules where it starts too, and at the root of this repository lie parts of a package.
    with contextlib.chdir(Path(__file__).parent):
        ray.init("local", num_cpus=options.replicas, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        editor = serve.run(deployment(options.replicas, device), blocking=options.serve)
        return try_out(f"http://127.0.0.1:{port}", editor)
    except KeyboardInterrupt:
        return {}
    finally:
        serve.shutdown()
        ray.shutdown()


def free_port() -> int:
    """One that nobody listens at now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


if __name__ == "__main__":
    main()
