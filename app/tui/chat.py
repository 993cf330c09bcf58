"""The conversation on screen, kept in step with the history file."""

from __future__ import annotations

from app.engine.protocol import Message
from app.history.records import Conversation, StoredMessage
from app.history.store import History

_TRIED = 50
"""Of the chats used last, how many are tried until one is open in no other gryphon."""


class Chat:
    """One path through a conversation's tree. It is written to the file from its first word on;
    an empty chat is no row at all."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.conversation: Conversation | None = None
        self.path: list[StoredMessage] = []
        """Root to leaf: what is shown."""
        self.draft = ""
        """Typed and not sent, as last saved."""

    @property
    def engine_chat(self) -> str:
        """The name under which the engine keeps what it has read of it."""
        return self._conversation().engine_chat

    def resume(self) -> bool:
        """Open the chat used last of those that no other gryphon has open; False when that is
        not the last of all."""
        conversations = self.history.conversations(limit=_TRIED)
        for conversation in conversations:
            if self.history.claim(conversation.id):
                self.conversation = conversation
                self.path = self.history.path_to_leaf(conversation.id)
                self.draft = conversation.draft
                return conversation == conversations[0]
        return not conversations

    def start_new(self) -> None:
        """Leave this conversation for an empty one."""
        self.save_draft("")
        if self.conversation is not None:
            self.history.release(self.conversation.id)
        self.conversation = None
        self.path = []

    def say(self, text: str) -> StoredMessage:
        """Add what the person wrote; when this returns it is on disk."""
        parent = self.path[-1].id if self.path else None
        message = self.history.append(self._conversation().id, parent, "user", text)
        self.path.append(message)
        self.draft = ""
        return message

    def begin_answer(self, model: str) -> StoredMessage:
        """Add an empty answer to the last question. An earlier answer to it stays in the tree as
        a sibling and leaves the path."""
        if self.path and self.path[-1].role == "assistant":
            self.path.pop()
        parent = self.path[-1].id if self.path else None
        answer = self.history.append(
            self._conversation().id, parent, "assistant", "", model=model, state="streaming"
        )
        self.path.append(answer)
        return answer

    def replace_leaf(self, message: StoredMessage) -> None:
        """Put the finished answer where the streaming one was."""
        if self.path and self.path[-1].id == message.id:
            self.path[-1] = message

    def save_draft(self, text: str) -> None:
        """Keep what is typed. A conversation that holds neither message nor draft is removed."""
        if text == self.draft:
            return
        if text or self.path:
            self.history.save_draft(self._conversation().id, text)
        elif self.conversation is not None:
            self.history.delete_conversation(self.conversation.id)
            self.conversation = None
        self.draft = text

    def request_messages(self) -> list[Message]:
        """The path as the model is shown it: turns alternate, as chat templates demand.

        An answer that failed before its first word is left out, and the questions around it
        become one.
        """
        turns: list[Message] = []
        for message in self.path:
            if message.role == "assistant" and not message.content:
                continue
            if turns and turns[-1].role == message.role:
                joined = f"{turns.pop().content}\n\n{message.content}"
                turns.append(Message(message.role, joined))
            else:
                turns.append(Message(message.role, message.content, message.reasoning))
        return turns

    def _conversation(self) -> Conversation:
        if self.conversation is None:
            self.conversation = self.history.create_conversation()
        return self.conversation
