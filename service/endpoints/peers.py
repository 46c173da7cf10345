"""GET /models/{reference}/peers: which groups differ from their peers at this moment."""

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response

from service.anomaly.group_memory import ModelMemory
from service.anomaly.peers import Peer, compare
from service.anomaly.streams import NewestRow, Rules, read_newest
from service.codec.long_work import pause_if_due
from service.codec.request_body import JSON
from service.endpoints.context import ServiceContext
from service.endpoints.offload import run_in_thread_if_long
from service.endpoints.query_options import read_options
from service.endpoints.validation import merge, validate
from service.errors import NoOnlineCalibration, NotSupported
from service.inference.served_model import ServedModel
from service.schemas import PeersQuery


class PeersEndpoint:
    """The handler of GET /models/{reference}/peers."""

    def __init__(self, service: ServiceContext) -> None:
        self._service = service
        self._turn = asyncio.Lock()  # one comparison at a time, because a comparison may read many megabytes

    async def peers(self, request: Request) -> Response:
        """Compare the newest row of each group with those of its peers at the same moment."""
        served = self._service.find(request.path_params["reference"])
        options = read_options(PeersQuery, tuple(request.query_params.multi_items()))
        query = validate(PeersQuery, merge({}, options.values))
        memory = await self._memory(served)
        work = partial(_answer, served, memory, query)
        async with self._turn:
            content = await run_in_thread_if_long(work, float("inf"))
        return Response(content, media_type=JSON)

    async def _memory(self, served: ServedModel) -> ModelMemory:
        """Return the memory of the groups of a model. Raises NotSupported, NoOnlineCalibration, NotReady."""
        timeline = served.manifest.timeline
        if timeline is None or timeline.group_column is None or served.baseline is None:
            raise NotSupported(
                f"{served.name}@{served.version} was trained without groups, so it has no peers to compare",
                hint="train the model with --time and --group",
            )
        if not self._service.settings.online_calibration:
            raise NoOnlineCalibration(
                "the server remembers no judged rows of groups (ELBO_ONLINE_CALIBRATION=0)",
                hint="set ELBO_ONLINE_CALIBRATION=1",
            )
        return await self._service.groups.of(served)


def _answer(served: ServedModel, memory: ModelMemory, query: PeersQuery) -> bytes:
    """Return the content of a `PeersAnswer`. Raises TooFewPeers, NotReady."""
    newest: dict[str, NewestRow] = {}
    for name, payload in memory.file.contents():
        pause_if_due()
        row = read_newest(memory.rules, payload) if name else None
        if row is not None:
            newest[name] = row
    comparison = compare(memory.rules, newest, query.n, query.explain)
    names = served.row_schema.names
    content = {
        "model": served.name,
        "version": served.version,
        "time": comparison.time,
        "compared": comparison.compared,
        "others": comparison.others,
        "limit": comparison.limit,
        "scaled_by_group": memory.rules.features is not None,
        "groups": [_report(peer, comparison.limit, names, memory.rules) for peer in comparison.peers],
    }
    return orjson.dumps(content)


def _report(peer: Peer, limit: float, names: Sequence[str], rules: Rules) -> dict[str, Any]:
    """Return a `PeerReport`."""
    pause_if_due()
    baseline = rules.baseline
    return {
        "group": peer.group.encode("utf-8", "replace").decode(),  # JSON may contain half of a surrogate pair
        "time": peer.newest.time,
        "rank": peer.rank,
        "deviation": peer.deviation,
        "is_different": peer.deviation > limit,
        "score_deviation": peer.score_deviation,
        "feature_deviation": peer.feature_deviation,
        "score": peer.newest.score,
        "p_value": peer.newest.p_value,
        "has_baseline": baseline is not None and baseline.find(peer.group) != baseline.pool,
        "features": [
            {
                "name": names[feature.index],
                "deviation": feature.deviation,
                "value": feature.value,
                "peers": feature.peers,
            }
            for feature in peer.features
        ],
    }
