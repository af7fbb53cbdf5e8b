"""A stockroom: the agent looks items up and takes them, and is scored on what lies in its basket at the end.

The reward is 1.0 when the basket holds exactly what was wanted. Otherwise it is the part that agrees: of all units
that are wanted or taken, those that are both.

A row's fields: `stock` (item -> units on the shelf) and `wanted` (item -> units to bring).
"""

from dataclasses import dataclass, field

from fastapi import FastAPI, Request
from nemo_gym.base_resources_server import (
    BaseResourcesServerConfig,
    BaseSeedSessionRequest,
    BaseSeedSessionResponse,
    BaseVerifyRequest,
    BaseVerifyResponse,
    SimpleResourcesServer,
)
from nemo_gym.server_utils import SESSION_ID_KEY
from pydantic import BaseModel, Field

Units = dict[str, int]


@dataclass
class Room:
    """One session's shelf and basket."""

    stock: Units = field(default_factory=dict)
    basket: Units = field(default_factory=dict)


class StockroomSeedRequest(BaseSeedSessionRequest):
    stock: Units


class LookUpRequest(BaseModel):
    item: str


class TakeRequest(BaseModel):
    item: str
    quantity: int = Field(ge=1)


class StockroomVerifyRequest(BaseVerifyRequest):
    wanted: Units


class StockroomVerifyResponse(BaseVerifyResponse):
    wanted: Units
    basket: Units


def agreement(basket: Units, wanted: Units) -> float:
    """Units in both over units in either; 1.0 exactly when the two are equal."""
    items = basket.keys() | wanted.keys()
    either = sum(max(basket.get(item, 0), wanted.get(item, 0)) for item in items)
    both = sum(min(basket.get(item, 0), wanted.get(item, 0)) for item in items)
    return both / either if either else 1.0


class StockroomServer(SimpleResourcesServer):
    config: BaseResourcesServerConfig
    rooms: dict[str, Room] = Field(default_factory=dict)

    def setup_webserver(self) -> FastAPI:
        app = super().setup_webserver()
        # A tool is a route of the same name. Rows describe the tools to the model.
        app.post("/look_up")(self.look_up)
        app.post("/take")(self.take)
        return app

    def room(self, request: Request) -> Room:
        return self.rooms.setdefault(request.session[SESSION_ID_KEY], Room())

    async def seed_session(self, request: Request, body: StockroomSeedRequest) -> BaseSeedSessionResponse:
        self.rooms[request.session[SESSION_ID_KEY]] = Room(stock=dict(body.stock))
        return BaseSeedSessionResponse()

    async def look_up(self, request: Request, body: LookUpRequest) -> dict:
        return {"stock": self.room(request).stock.get(body.item, 0)}

    async def take(self, request: Request, body: TakeRequest) -> dict:
        room = self.room(request)
        left = room.stock.get(body.item, 0)
        if body.quantity > left:
            # An answer, not an exception: the model reads it and may do better.
            return {"error": f"only {left} left"}
        room.stock[body.item] = left - body.quantity
        room.basket[body.item] = room.basket.get(body.item, 0) + body.quantity
        return {"basket": room.basket}

    async def verify(self, request: Request, body: StockroomVerifyRequest) -> StockroomVerifyResponse:
        room = self.rooms.pop(request.session[SESSION_ID_KEY], Room())
        reward = agreement(room.basket, body.wanted)
        return StockroomVerifyResponse(**body.model_dump(), reward=reward, basket=room.basket)


if __name__ == "__main__":
    StockroomServer.run_webserver()
