"""litellm, in each of some dialects that it can speak. Arguments: URL, model, providers."""

import json
import sys
from importlib.metadata import version

import litellm

url, model, *providers = sys.argv[1:]
found = {"version": version("litellm")}
for provider in providers:
    options = {
        "model": f"{provider}/{model}",
        "messages": [{"role": "user", "content": "Hi"}],
        "api_base": f"{url}/v1" if provider == "openai" else url,
        "api_key": "unused",
        "max_retries": 0,
        "max_tokens": 64,
    }
    whole = litellm.completion(**options).choices[0].message.content
    parts = litellm.completion(**options, stream=True)
    found[provider] = [whole, "".join(part.choices[0].delta.content or "" for part in parts)]
print(json.dumps(found))
