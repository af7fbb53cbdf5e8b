"""The policy gateway: an endpoint over a token-in, token-out engine, for agents that speak OpenAI's or Anthropic's."""

from gymlink.gateway.app import create_app
from gymlink.gateway.front import agent_url, create_front
from gymlink.gateway.http import guarded, read_body, until_hang_up
from gymlink.gateway.recognise import rollout_key, rollout_path
from gymlink.gateway.rollouts import OpenRollout
from gymlink.gateway.router import Router, new_rollout_id
from gymlink.gateway.server import GatewayServer
from gymlink.gateway.service import POLICY, PolicyService, Totals
from gymlink.gateway.wire import ROLLOUT_FIELD, WireError, json_response, parse_body

__all__ = [
    "POLICY",
    "ROLLOUT_FIELD",
    "GatewayServer",
    "OpenRollout",
    "PolicyService",
    "Router",
    "Totals",
    "WireError",
    "agent_url",
    "create_app",
    "create_front",
    "guarded",
    "json_response",
    "new_rollout_id",
    "parse_body",
    "read_body",
    "rollout_key",
    "rollout_path",
    "until_hang_up",
]
