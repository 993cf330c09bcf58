"""The JSON of others, and our own, as chats on their way in."""

from __future__ import annotations

import json
from typing import Any, cast, get_args

import msgspec

from app.engine.protocol import ToolCallPart, check_sampling
from app.errors import GryphonError
from app.history.conversations import MAX_ATTACHMENT_CHARACTERS, decode_parameters
from app.history.export import FORMAT, VERSION
from app.history.foreign_json import Place, parents_first
from app.history.incoming import IncomingChat, IncomingMessage, digest_uid
from app.history.records import (
    AnswerStats,
    Attachment,
    MessageState,
    Parameters,
    Role,
    TitledBy,
)
from app.history.text import one_line

MAX_UID_CHARACTERS = 150

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
}


def chats_in(file: Place) -> list[IncomingChat]:
    """The chats of a document: our export, ChatGPT's conversations.json, or messages as OpenAI's
    and Ollama's APIs take them, in a list or under "messages", of one chat or of many.

    Raises:
        GryphonError: "invalid_import", naming the place of what is wrong.
    """
    value = file.value
    if isinstance(value, dict) and "format" in value:
        return _own(file)
    ones = [file] if isinstance(value, dict) else list(file)
    if not ones:
        file.refuse("a list of chats or of messages that is not empty")
    if "role" in ones[0]:
        return [_from_messages(file, {})]
    chats = []
    for one in ones:
        if "mapping" in one:
            chats.append(_from_chatgpt(one))
        elif "messages" in one:
            chats.append(_from_messages(one["messages"], one.value))
        else:
            one.refuse(
                'a chat (with "mapping", as ChatGPT exports them, or "messages"), or a message '
                '(with "role")'
            )
    return chats


def _own(file: Place) -> list[IncomingChat]:
    file["format"].one_of([FORMAT])
    if file["version"].count() != VERSION:
        file["version"].refuse(f"{VERSION}: update Gryphon if a newer one wrote it")
    return [_own_chat(one) for one in file["chats"]]


def _own_chat(chat: Place) -> IncomingChat:
    texts = {}
    for digest in chat["attachments"].names() if "attachments" in chat else ():
        place = chat["attachments"][digest]
        text = place.text()
        if len(text) > MAX_ATTACHMENT_CHARACTERS:
            place.refuse(f"text of at most {MAX_ATTACHMENT_CHARACTERS} characters")
        if Attachment("", text).digest != digest:
            place.refuse(f"the text with the SHA-256 {digest[:64]}")
        texts[digest] = text
    places: dict[int, Place] = {}
    for one in chat["messages"]:
        id = one["id"].count()
        if id in places:
            one["id"].refuse("a number that no other message has")
        places[id] = one
    parents = {
        id: None if one["parent"].value is None else one["parent"].count()
        for id, one in places.items()
    }
    order = parents_first(parents, lambda id: places[id]["parent"])
    index = {id: number for number, id in enumerate(order)}
    messages = []
    for id in order:
        parent = parents[id]
        messages.append(_own_message(places[id], texts))
        messages[-1].parent = None if parent is None else index[parent]
    active = None
    if "active" in chat:
        active = chat["active"].count()
        if active not in index:
            chat["active"].refuse("the id of a message")
        active = index[active]
    return IncomingChat(
        uid=_uid(chat["uid"]),
        messages=messages,
        active=active,
        title=chat["title"].text(""),
        titled_by=cast(TitledBy, chat["titled_by"].one_of(get_args(TitledBy), "person")),
        folder=chat["folder"].text(""),
        pinned=chat["pinned"].flag(),
        created=chat["created"].moment(),
        updated=chat["updated"].moment(),
        model=chat["model"].text(""),
        adapter=chat["adapter"].text(""),
        system_prompt=chat["system_prompt"].text(""),
        parameters=_parameters(chat["parameters"]),
        draft=chat["draft"].text(""),
        draft_attachments=_own_attachments(chat["draft_attachments"], texts),
        commands=[(one["text"].text(), one["created"].moment() or 0.0) for one in chat["commands"]],
    )


def _own_message(one: Place, texts: dict[str, str]) -> IncomingMessage:
    stats = None
    if "stats" in one:
        try:
            stats = msgspec.convert(one["stats"].value, AnswerStats)
        except msgspec.ValidationError as error:
            one["stats"].refuse(f"the figures of an answer ({error})")
    return IncomingMessage(
        role=cast(Role, one["role"].one_of(get_args(Role))),
        content=one["content"].text(),
        shown=one["shown"].count(),
        reasoning=one["reasoning"].text(""),
        tool_calls=tuple(_tool_call(call, call) for call in one["tool_calls"]),
        tool_call_id=one["tool_call_id"].text(""),
        model=one["model"].optional_text(),
        state=cast(MessageState, one["state"].one_of(get_args(MessageState), "complete")),
        finish_reason=one["finish_reason"].optional_text(),
        error=one["error"].optional_text(),
        stats=stats,
        created=one["created"].moment(),
        attachments=_own_attachments(one["attachments"], texts),
    )


def _own_attachments(places: Place, texts: dict[str, str]) -> tuple[Attachment, ...]:
    attachments = []
    for one in places:
        digest = one["digest"].text()
        if digest not in texts:
            one["digest"].refuse("the digest of one of the chat's attachments")
        attachments.append(Attachment(one_line(one["name"].text(), 255), texts[digest]))
    return tuple(attachments)


def _parameters(place: Place) -> Parameters:
    try:
        parameters = decode_parameters(json.dumps(place.value or {}))
        check_sampling(parameters.sampling)
    except msgspec.DecodeError as error:
        place.refuse(f"the parameters of a chat ({error})")
    except GryphonError as error:
        place.refuse(f"sound parameters ({error.message})")
    return parameters


def _uid(place: Place, prefix: str = "") -> str:
    text = place.text()
    if not 1 <= len(text) <= MAX_UID_CHARACTERS:
        place.refuse(f"1 to {MAX_UID_CHARACTERS} characters")
    return prefix + text


def _from_chatgpt(chat: Place) -> IncomingChat:
    """What a person saw of it: not what was hidden, and not what tools were told and said."""
    mapping = chat["mapping"]
    parents = {node: mapping[node]["parent"].optional_text() for node in mapping.names()}
    order = parents_first(parents, lambda node: mapping[node]["parent"])
    key = next((key for key in ("conversation_id", "id") if key in chat), None)
    incoming = IncomingChat(
        uid=_uid(chat[key], "chatgpt-") if key else digest_uid(chat.value),
        title=chat["title"].text(""),
        created=chat["create_time"].moment(),
        updated=chat["update_time"].moment(),
        pinned=chat["is_starred"].flag(),
    )
    # Of each node: where the nearest message above it is that was kept, or it itself; and what was
    # thought since.
    kept: dict[str, tuple[int | None, str]] = {}
    for node in order:
        parent = parents[node]
        above, thought = (None, "") if parent is None else kept[parent]
        place = mapping[node]["message"]
        message = None if place.value is None else _chatgpt_message(place, incoming)
        if message is None:
            kept[node] = (above, thought)
        elif not message.content:
            kept[node] = (above, "\n\n".join(filter(None, [thought, message.reasoning])))
        else:
            message.parent = above
            message.shown = len(incoming.messages)
            if message.role == "assistant":
                message.reasoning = thought
            incoming.messages.append(message)
            kept[node] = (len(incoming.messages) - 1, "")
    if "current_node" in chat:
        current = chat["current_node"].text()
        if current not in kept:
            chat["current_node"].refuse("the id of a message in mapping")
        incoming.active = kept[current][0]
    return incoming


def _chatgpt_message(place: Place, chat: IncomingChat) -> IncomingMessage | None:
    """The message; with reasoning and no content where it is a thought; None if nobody saw it."""
    role = _role(place["author"]["role"])
    is_hidden = place["metadata"].value is not None and (
        place["metadata"]["is_visually_hidden_from_conversation"].value is True
    )
    if role in ("tool", "system") or is_hidden or place["weight"].value == 0:
        return None
    if place["recipient"].text("all") != "all":
        return None
    content = place["content"]
    message = IncomingMessage(role, "", created=place["create_time"].moment())
    if role == "assistant" and place["metadata"].value is not None:
        message.model = place["metadata"]["model_slug"].optional_text()
    match content["content_type"].text("text"):
        case "thoughts":
            texts = [
                one["content"].text("") or one["summary"].text("") for one in content["thoughts"]
            ]
            message.reasoning = "\n\n".join(filter(None, texts))
        case "reasoning_recap" | "user_editable_context" | "model_editable_context":
            return None
        case _ if "parts" in content:
            message.content = _parts_text(content["parts"], chat)
        case _:
            message.content = content["text"].text("")
    return message if message.content or message.reasoning else None


def _from_messages(messages: Place, about: dict[str, Any]) -> IncomingChat:
    """A list of messages, one after the other."""
    chat = IncomingChat(uid=digest_uid(messages.value))
    about_place = Place(about, messages.where.removesuffix(".messages"))
    chat.title = about_place["title"].text("")
    chat.model = about_place["model"].text("")
    chat.system_prompt = about_place["system"].text("")
    names: dict[str, str] = {}
    for one in messages:
        role = _role(one["role"])
        text = _content_text(one["content"], chat)
        images = len(list(one["images"]))
        chat.left_out += images
        text = "\n\n".join(filter(None, [text, *["[image not imported]"] * images]))
        if role == "system" and not chat.messages:
            chat.system_prompt = "\n\n".join(filter(None, [chat.system_prompt, text]))
            continue
        message = IncomingMessage(role, text)
        if role == "assistant":
            message.reasoning = one["reasoning_content"].text("") or one["thinking"].text("")
            message.model = one["model"].optional_text() or chat.model or None
            message.tool_calls = tuple(
                _tool_call(call, call["function"]) for call in one["tool_calls"]
            )
            names |= {call.name: call.id for call in message.tool_calls}
        elif role == "tool":
            name = one["tool_name"].text("") or one["name"].text("")
            message.tool_call_id = one["tool_call_id"].text("") or names.get(name, "")
        if chat.messages:
            message.parent = len(chat.messages) - 1
        chat.messages.append(message)
    if not chat.messages:
        messages.refuse("a list with at least one message by the user or the assistant")
    return chat


def _role(place: Place) -> Role:
    return _ROLES[place.one_of(list(_ROLES))]


def _content_text(content: Place, chat: IncomingChat) -> str:
    return _parts_text(content, chat) if isinstance(content.value, list) else content.text("")


def _parts_text(parts: Place, chat: IncomingChat) -> str:
    """The text of a message's parts; of the others, that they were there."""
    texts = []
    for part in parts:
        if isinstance(part.value, dict):
            if "text" in part:
                texts.append(part["text"].text())
            else:
                chat.left_out += 1
                kind = part["type"].value or part["content_type"].value
                name = kind if isinstance(kind, str) else "part"
                texts.append(f"[{one_line(name, 40)} not imported]")
        elif part.value is not None:
            texts.append(part.text())
    return "\n\n".join(filter(None, texts))


def _tool_call(call: Place, function: Place) -> ToolCallPart:
    """OpenAI has the arguments as JSON text, Ollama as an object."""
    arguments = function["arguments"]
    is_object = isinstance(arguments.value, dict)
    text = json.dumps(arguments.value) if is_object else arguments.text("{}")
    return ToolCallPart(call["id"].text(""), function["name"].text(), text)
