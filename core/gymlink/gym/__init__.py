"""NeMo Gym as a process: its interpreter, its environments, its servers, its rows, and a client for them.

Gym never shares an interpreter with the trainer, and gymlink never imports it.
"""

from gymlink.gym.captured import capture_folder, captured_ids
from gymlink.gym.client import Addresses, GymClient
from gymlink.gym.install import GymEnvironment, cache_folder, prepare_gym
from gymlink.gym.interpreter import Interpreter, find_interpreter
from gymlink.gym.rows import agent_of, check_rows, parse_row, read_rows, readable_messages, source_of
from gymlink.gym.servers import GymServers, Server, attach_gym, start_gym

__all__ = [
    "Addresses",
    "GymClient",
    "GymEnvironment",
    "GymServers",
    "Interpreter",
    "Server",
    "agent_of",
    "attach_gym",
    "cache_folder",
    "capture_folder",
    "captured_ids",
    "check_rows",
    "find_interpreter",
    "parse_row",
    "prepare_gym",
    "read_rows",
    "readable_messages",
    "source_of",
    "start_gym",
]
