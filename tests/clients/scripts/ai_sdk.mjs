// The AI SDK with its provider for OpenAI-compatible servers, as OpenCode uses it.
// Arguments: URL, model.
import { readFileSync } from "node:fs";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateText, jsonSchema, streamText, tool } from "ai";

const [url, name] = process.argv.slice(2);
const gryphon = createOpenAICompatible({
  name: "gryphon", baseURL: `${url}/v1`, apiKey: "unused", includeUsage: true,
});
const model = gryphon(name);
const options = { model, prompt: "Hi", maxRetries: 0 };
const { version } = JSON.parse(readFileSync("node_modules/@ai-sdk/openai-compatible/package.json"));
const inputSchema = jsonSchema({
  type: "object", properties: { city: { type: "string" } }, required: ["city"],
});
const tools = { weather: tool({ description: "The weather of a city", inputSchema }) };

const whole = await generateText(options);
const streamed = streamText(options);
const stream = await streamed.text;
const usage = (await streamed.usage).totalTokens;
const called = streamText({ ...options, tools });
const calls = (await called.toolCalls).map((one) => [one.toolName, one.input]);
console.log(JSON.stringify({ version, chat: whole.text, stream, usage, calls }));
