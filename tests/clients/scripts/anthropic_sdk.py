"""The anthropic package. Arguments: URL, model."""

import json
import sys

import anthropic

url, model = sys.argv[1:]
client = anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0)
ask = [{"role": "user", "content": "Hi"}]
weather = {
    "name": "weather",
    "description": "The weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
    },
}

found = {"version": anthropic.__version__}
whole = client.messages.create(model=model, max_tokens=64, messages=ask, system="Be brief.")
found["message"] = whole.content[0].text
found["stop reason"] = whole.stop_reason
with client.messages.stream(model=model, max_tokens=64, messages=ask) as stream:
    found["stream"] = "".join(stream.text_stream)
    found["usage"] = stream.get_final_message().usage.output_tokens
call = client.messages.create(model=model, max_tokens=64, messages=ask, tools=[weather])
found["calls"] = [[one.name, one.input] for one in call.content if one.type == "tool_use"]
result = {"type": "tool_result", "tool_use_id": call.content[-1].id, "content": "sun"}
answered = client.messages.create(
    model=model,
    max_tokens=64,
    messages=[
        *ask,
        {"role": "assistant", "content": call.content},
        {"role": "user", "content": [result]},
    ],
    tools=[weather],
)
found["after the call"] = answered.content[0].text
found["counted"] = client.messages.count_tokens(model=model, messages=ask).input_tokens
print(json.dumps(found))
