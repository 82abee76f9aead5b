// Counts the tokens of conversations.json with two of OpenAI's tokenizers and
// writes them to counts.tsv: conversation, message, bytes, o200k, cl100k.
//
//   npm install gpt-tokenizer@3.4.0 && node count.mjs >counts.tsv
import { readFileSync } from 'node:fs';
import { encode as o200k } from 'gpt-tokenizer/encoding/o200k_base';
import { encode as cl100k } from 'gpt-tokenizer/encoding/cl100k_base';

const here = new URL('conversations.json', import.meta.url);

for (const [name, messages] of Object.entries(JSON.parse(readFileSync(here))))
  messages.forEach((text, i) => console.log([name, i + 1,
    Buffer.byteLength(text), o200k(text).length, cl100k(text).length].join('\t')));
