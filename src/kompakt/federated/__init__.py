"""Updates of a model between devices: differences to a shared base, in as few bytes as they need.

``kompakt.federated.flower`` brings them into Flower; it needs the extra ``kompakt[federated]``.
"""

from kompakt.federated.average import Momentum, average_states
from kompakt.federated.broadcast import Packet
from kompakt.federated.decode import decode_update
from kompakt.federated.encode import encode_update
from kompakt.federated.feedback import Feedback
from kompakt.federated.layout import hash_state
from kompakt.federated.limits import Limits
from kompakt.federated.member import Member, Receipt
from kompakt.federated.server import Server
from kompakt.federated.spec import UpdateSpec

__all__ = [
    "Feedback",
    "Limits",
    "Member",
    "Momentum",
    "Packet",
    "Receipt",
    "Server",
    "UpdateSpec",
    "average_states",
    "decode_update",
    "encode_update",
    "hash_state",
]
