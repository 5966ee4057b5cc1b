"""POST /v1/embeddings: the mean, or the last, of a model's last hidden states over a text, of length 1.

`model` is a served model's name, and takes the mean; `NAME#last` takes the last token's state. The models here were trained to write and not to
tell texts apart. `dimensions` keeps the first so many numbers and makes their length 1 again; nothing was trained for such a cut.
"""

import asyncio
import base64
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from saddlepoint.service.completions import Ids, each, weights
from saddlepoint.service.errors import ApiError
from saddlepoint.service.routing import sees

if TYPE_CHECKING:
    from saddlepoint.service.app import Service
    from saddlepoint.service.chat import Served

MOST = 256  # texts of a request
Text = Annotated[str, Field(min_length=1)]


class EmbeddingRequest(BaseModel):
    """The body of POST /v1/embeddings."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str
    input: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST)]
        | Ids
        | Annotated[list[Ids], Field(min_length=1, max_length=MOST)]
    )
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None


def embedded(request: EmbeddingRequest, served: "Served", last: bool) -> dict[str, Any]:
    """The response to a request.

    Raises:
        ApiError: A text is too long or no text of this model, or more dimensions are wanted than there are.
    """
    import torch

    from saddlepoint.targets._reading import vectors

    model = weights(served, "an embedding")
    vocabulary, width = model.embedding.shape
    rows = []
    for one in each(request.input):
        try:
            ids = model.text_ids(one) if isinstance(one, str) else one
        except (ValueError, TypeError) as broken:  # half a character
            raise ApiError(400, f"the input cannot be written as tokens: {broken}", "invalid_value", "input") from None
        if len(ids) > model.context:
            raise ApiError(400, f"an input has {len(ids)} tokens; the model reads {model.context}", "context_length_exceeded", "input")
        if max(ids) >= vocabulary:
            raise ApiError(400, f"token ids lie in 0..{vocabulary - 1}, got {max(ids)}", "invalid_value", "input")
        rows.append(ids)
    if (request.dimensions or width) > width:
        raise ApiError(400, f"'{served.name}' has {width} dimensions; got {request.dimensions}", "invalid_value", "dimensions")
    found = vectors(model, rows, "last" if last else "mean")[:, : request.dimensions or width]
    found = torch.nn.functional.normalize(found, dim=1)
    whole = request.encoding_format == "base64"
    listed = [base64.b64encode(row.numpy().astype("<f4").tobytes()).decode() if whole else row.tolist() for row in found]
    read = sum(map(len, rows))
    data = [{"object": "embedding", "index": i, "embedding": one} for i, one in enumerate(listed)]
    return {"object": "list", "data": data, "model": served.name, "usage": {"prompt_tokens": read, "total_tokens": read}}


def routes(service: "Service") -> APIRouter:
    """POST /v1/embeddings."""
    made = APIRouter(tags=["embeddings"])

    @made.post("/v1/embeddings")
    async def create_embedding(body: EmbeddingRequest, request: Request) -> dict[str, Any]:
        """A vector for each text."""
        name, sign, pooling = body.model.rpartition("#")
        last = bool(sign) and pooling == "last"

        def work() -> dict[str, Any]:
            return embedded(body, service.model(name if last else body.model, sees(request)), last)

        found = await asyncio.get_running_loop().run_in_executor(service.pool, work)
        service.meters.tokens.labels("prompt").inc(found["usage"]["prompt_tokens"])
        return found

    return made
