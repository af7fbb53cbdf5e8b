"""The policy gateway: an OpenAI-compatible endpoint over a token-in, token-out engine."""

from gymlink.gateway.app import create_app
from gymlink.gateway.front import agent_url, create_front
from gymlink.gateway.rollouts import OpenRollout
from gymlink.gateway.router import Router, new_rollout_id
from gymlink.gateway.server import GatewayServer
from gymlink.gateway.service import PolicyService, Totals
from gymlink.gateway.wire import ROLLOUT_FIELD

__all__ = [
    "ROLLOUT_FIELD",
    "GatewayServer",
    "OpenRollout",
    "PolicyService",
    "Router",
    "Totals",
    "agent_url",
    "create_app",
    "create_front",
    "new_rollout_id",
]
