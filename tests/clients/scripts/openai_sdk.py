"""The openai package: every call that Gryphon answers. Arguments: URL, model."""

import json
import sys

import openai

url, model = sys.argv[1:]
client = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
ask = [{"role": "user", "content": "Hi"}]
weather = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}

found = {"version": openai.__version__, "models": [one.id for one in client.models.list()]}
found["chat"] = client.chat.completions.create(model=model, messages=ask).choices[0].message.content
with client.chat.completions.stream(
    model=model, messages=ask, stream_options={"include_usage": True}
) as stream:
    final = stream.get_final_completion()
found["stream"] = final.choices[0].message.content
found["usage"] = final.usage.total_tokens
call = client.chat.completions.create(model=model, messages=ask, tools=[weather], seed=1)
found["calls"] = [
    [one.function.name, json.loads(one.function.arguments)]
    for one in call.choices[0].message.tool_calls
]
answered = client.chat.completions.create(
    model=model,
    messages=[
        *ask,
        call.choices[0].message,
        {
            "role": "tool",
            "tool_call_id": call.choices[0].message.tool_calls[0].id,
            "content": "sun",
        },
    ],
    tools=[weather],
)
found["after the call"] = answered.choices[0].message.content
found["completion"] = client.completions.create(model=model, prompt="Once").choices[0].text
found["response"] = client.responses.create(model=model, input="Hi").output_text
vectors = client.embeddings.create(model=model, input=["Hi", "Bye"]).data
found["vectors"] = [[one.index, len(one.embedding)] for one in vectors]
with client.responses.stream(model=model, input="Hi") as events:
    found["response stream"] = events.get_final_response().output_text
print(json.dumps(found))
