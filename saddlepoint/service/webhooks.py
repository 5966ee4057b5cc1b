"""Sending webhooks: signed as the official client's `webhooks.unwrap` verifies them, again and again until they are received."""

import asyncio
import base64
import hashlib
import hmac
import logging
import time

import aiohttp

from saddlepoint.errors import StoreError
from saddlepoint.service.outbox import Outbox
from saddlepoint.service.records import Delivery

LOOK = 1.0  # seconds between two looks for something to send
PATIENCE = 10.0  # seconds for an answer
LEASE = 60.0  # seconds for which one server has a webhook to send
FIRST, LONGEST = 2.0, 3600.0  # seconds between tries; doubled each time
GIVEN_UP = 3 * 24 * 3600  # seconds after which nothing is tried any more

log = logging.getLogger("saddlepoint")


def signed(id: str, at: int, body: str, secret: str) -> dict[str, str]:
    """The headers of a webhook.

    Args:
        at: When it is sent, in seconds since 1970; receivers refuse what is older than five minutes.
        secret: `whsec_` and base64.
    """
    key = base64.b64decode(secret.removeprefix("whsec_"))
    signature = base64.b64encode(hmac.new(key, f"{id}.{at}.{body}".encode(), hashlib.sha256).digest()).decode()
    return {
        "content-type": "application/json",
        "webhook-id": id,
        "webhook-timestamp": str(at),
        "webhook-signature": f"v1,{signature}",
    }


async def send(outbox: Outbox) -> None:
    """Send what is due, until cancelled."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PATIENCE)) as session:
        while True:
            try:
                due = await asyncio.to_thread(outbox.due, LEASE)
                if due is None:
                    await asyncio.sleep(LOOK)
                elif await _received(session, due):
                    await asyncio.to_thread(outbox.delivered, due)
                elif time.time() - due.created_at > GIVEN_UP:
                    log.error("the webhook %s to %s is given up after %d tries", due.id, due.url, due.tries)
                    await asyncio.to_thread(outbox.delivered, due)
                else:
                    await asyncio.to_thread(outbox.again, due, min(LONGEST, FIRST * 2 ** min(due.tries - 1, 30)))
            except StoreError as wrong:
                log.error("webhooks wait: %s", wrong)
                await asyncio.sleep(LOOK)


async def _received(session: aiohttp.ClientSession, due: Delivery) -> bool:
    headers = signed(due.id, int(time.time()), due.body, due.secret)
    try:
        async with session.post(due.url, data=due.body.encode(), headers=headers, allow_redirects=False) as answer:
            if answer.status < 300:
                return True
            log.warning("the webhook %s to %s was answered with %d", due.id, due.url, answer.status)
    except (aiohttp.ClientError, TimeoutError, OSError) as wrong:
        log.warning("the webhook %s to %s failed: %s", due.id, due.url, str(wrong) or type(wrong).__name__)
    return False
