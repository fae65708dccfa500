"""The client's half of Flower's adapter: a mod around the app."""

from pathlib import Path

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.clientapp.typing import ClientAppCallable

from kompakt.errors import KompaktError
from kompakt.federated.carry import (
    RECORD,
    Answer,
    Task,
    array_key,
    read_task,
    to_arrays,
    to_state,
    write_answer,
)
from kompakt.federated.encode import DEFAULT
from kompakt.federated.member import Member
from kompakt.federated.spec import UpdateSpec


class CompressionMod:
    """A mod that receives packets and sends updates, while the app sees whole states.

    A message of a server that does not compress passes untouched. What a client must remember (the state it holds, what
    it could not send yet) is in ``folder/run-RUN/CLIENT``; CLIENT is the node's ``partition-id`` where it has one,
    so that a restarted node goes on with what it has.

    Args:
        spec: how updates are coded.
        folder: where clients remember.
    """

    def __init__(self, spec: UpdateSpec = DEFAULT, folder: str | Path = ".kompakt-federated") -> None:
        self._spec, self._folder = spec, Path(folder)

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Open the packet, call the app, code what it returns."""
        task = read_task(message.content)
        if task is None:
            return call_next(message, context)
        client = context.node_config.get("partition-id", context.node_id)
        folder = self._folder / f"run-{context.run_id}" / str(client)
        try:
            member, seed = Member(folder, self._spec), _number(client)
            return self._answered(message, context, call_next, task, member, seed)
        except KompaktError as error:
            for file in folder.glob("held.safetensors"):
                file.unlink()
            return _problem(message, Answer(held=None, problem=str(error)))

    def _answered(
        self, message: Message, context: Context, call_next: ClientAppCallable, task: Task, member: Member, seed: int
    ) -> Message:
        training = message.metadata.message_type.partition(".")[0] == MessageType.TRAIN
        state = member.open(task.packet, task.receipt if training else None)
        content = RecordDict({name: record for name, record in message.content.items() if name != RECORD})
        content[array_key(message.content)] = to_arrays(state)
        message.content = content
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        answer = Answer(held=member.number)
        if training:
            try:
                new = to_state(reply.content.array_records[array_key(reply.content)])
                update = member.encode(new, task.round, seed)
            except KompaktError as error:
                return _problem(message, Answer(held=member.number, problem=str(error)))
            answer = Answer(held=member.number, round=task.round, update=update)
            del reply.content[array_key(reply.content)]
        reply.content[RECORD] = write_answer(answer)
        return reply


def _number(client: object) -> int:
    """A number of a client that is the same in every process (``hash`` of a text is not)."""
    return client if isinstance(client, int) else int.from_bytes(str(client).encode()[:6], "little")


def _problem(message: Message, answer: Answer) -> Message:
    return Message(RecordDict({RECORD: write_answer(answer)}), reply_to=message)
