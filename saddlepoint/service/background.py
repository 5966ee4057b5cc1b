"""What runs beside the routes while the server does: the worker, webhooks, and the removal of what has expired."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager

from fastapi import FastAPI

from saddlepoint.errors import SaddlepointError
from saddlepoint.service import webhooks
from saddlepoint.service.processes import kept_running
from saddlepoint.service.routing import Tuning

WORKER = "saddlepoint.service.worker"
SWEEP = 60.0  # seconds between two looks for what has expired
ORPHANS = 6 * 3600.0  # and between two looks for what killed processes left

log = logging.getLogger("saddlepoint")


def living(tuning: Tuning) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """The lifespan of an application that tunes."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with ExitStack() as stack:
            if tuning.worker:
                stack.enter_context(kept_running(WORKER, *tuning.worker))
            tasks = [asyncio.create_task(webhooks.send(tuning.state.outbox)), asyncio.create_task(_sweeping(tuning))]
            try:
                yield
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await asyncio.to_thread(stack.close)  # the worker saves what is under way, which takes a while

    return lifespan


async def _sweeping(tuning: Tuning) -> None:
    shelf, looked = tuning.state.files, -ORPHANS
    while True:
        try:
            await asyncio.to_thread(shelf.sweep)
            await asyncio.to_thread(tuning.state.expire)
            if time.monotonic() - looked > ORPHANS:
                looked = time.monotonic()
                await asyncio.to_thread(tuning.blobs.sweep, shelf.forget)
        except (SaddlepointError, OSError) as wrong:
            log.error("what has expired stays for now: %s", wrong)
        await asyncio.sleep(SWEEP)
