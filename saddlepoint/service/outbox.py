"""Webhooks that are to be sent, in the service's database: written with the end of a job, in one transaction."""

import base64
import json
import re
import secrets
import time
from collections.abc import Collection
from typing import Any

from sqlalchemy import Connection, Engine, delete, insert, select, update

from saddlepoint.errors import UsageError
from saddlepoint.service.records import Delivery
from saddlepoint.service.rows import fresh
from saddlepoint.service.schema import DELIVERY, HOOK, clock, writing


def announce(db: Connection, job: str, status: str) -> None:
    """Write down that everybody who subscribed is to be told of a job's end."""
    now = int(time.time())
    body = {"id": fresh("evt_"), "object": "event", "type": f"fine_tuning.job.{status}", "created_at": now, "data": {"id": job}}
    for url in db.execute(select(HOOK.c.url)).scalars().all():
        db.execute(insert(DELIVERY).values(id=body["id"], url=url, body=json.dumps(body), created_at=now, tries=0, due=0.0))


class Outbox:
    """Webhooks that are to be sent."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def subscribe(self, urls: Collection[str]) -> dict[str, str]:
        """Whom to tell of the ends of jobs from now on, and nobody else: the URLs with their secrets. One that is known keeps its secret.

        Raises:
            UsageError: One is no URL.
        """
        if wrong := [url for url in urls if not re.fullmatch(r"https?://[^\s/?#]+\S*", url)]:
            raise UsageError(f"--webhook {wrong[0]}: give a URL that begins with http:// or https://")
        with writing(self._engine, alone=True) as db:
            known = {url: secret for url, secret in db.execute(select(HOOK.c.url, HOOK.c.secret))}
            found = {url: known.get(url) or "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode() for url in urls}
            db.execute(delete(HOOK))
            db.execute(delete(DELIVERY).where(DELIVERY.c.url.not_in(found)))
            for url, secret in found.items():
                db.execute(insert(HOOK).values(url=url, secret=secret))
        return found

    def due(self, lease: float) -> Delivery | None:
        """Take a webhook that is to be sent now; no other server gets it for `lease` seconds."""
        with writing(self._engine) as db:
            now = clock(db)
            query = select(DELIVERY, HOOK.c.secret).join(HOOK, HOOK.c.url == DELIVERY.c.url).where(DELIVERY.c.due <= now)
            row = db.execute(query.order_by(DELIVERY.c.due).limit(1).with_for_update(skip_locked=True, of=DELIVERY)).first()
            if row is None:
                return None
            self._set(db, row.id, row.url, due=now + lease, tries=row.tries + 1)
            return Delivery(row.id, row.url, row.secret, row.body, row.created_at, row.tries + 1)

    def delivered(self, sent: Delivery) -> None:
        """It was received, or is given up."""
        with writing(self._engine) as db:
            db.execute(delete(DELIVERY).where(DELIVERY.c.id == sent.id, DELIVERY.c.url == sent.url))

    def again(self, sent: Delivery, seconds: float) -> None:
        """It was not received; try once more after so many seconds."""
        with writing(self._engine) as db:
            self._set(db, sent.id, sent.url, due=clock(db) + seconds)

    def _set(self, db: Connection, id: str, url: str, **values: Any) -> None:
        db.execute(update(DELIVERY).where(DELIVERY.c.id == id, DELIVERY.c.url == url).values(**values))
