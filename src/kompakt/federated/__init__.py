"""Updates of a model between devices: differences to a shared base, in as few bytes as they need."""

from kompakt.federated.decode import decode_update
from kompakt.federated.encode import encode_update
from kompakt.federated.feedback import Feedback
from kompakt.federated.layout import hash_state
from kompakt.federated.spec import UpdateSpec

__all__ = ["Feedback", "UpdateSpec", "decode_update", "encode_update", "hash_state"]
