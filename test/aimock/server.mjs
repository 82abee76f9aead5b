// Starts npm's aimock with the answers that foreign_api.pl asks for; prints
// "port=N" and ends when its standard input does.
import { createRequire } from 'node:module';
import path from 'node:path';

const require = createRequire(path.join(process.argv[2], 'x.js'));
const { LLMock } = require('@copilotkit/aimock');
const mock = new LLMock({ port: 0, host: '127.0.0.1' });

mock.onMessage('plain', { content: 'The quick brown fox jumps over the lazy dog.' }, { chunkSize: 3 });
mock.onMessage('unicode', { content: 'Grüße, 世界! “quoted” \\ back\nslash' }, { chunkSize: 1 });
mock.onMessage('think', { content: 'Forty-two.', reasoning: 'Six times nine …' });
mock.on({ userMessage: 'weather', hasToolResult: false }, {
	toolCalls: [
		{ id: 'call_a', name: 'get_weather', arguments: '{"city":"Paris"}' },
		{ id: 'call_b', name: 'get_weather', arguments: '{"city":"Rome"}' },
	],
});
mock.on({ userMessage: 'weather', hasToolResult: true }, { content: 'Sunny in both.' });
mock.on({ userMessage: 'limited', sequenceIndex: 0 }, {
	error: { message: 'Slow down, please.', type: 'rate_limit_error', code: 'rate_limit_exceeded' },
	status: 429,
	retryAfter: 1,
});
mock.on({ userMessage: 'limited' }, { content: 'Here you are.' });
mock.on({ userMessage: 'refused' }, {
	error: { message: 'You may not.', type: 'invalid_request_error', code: 'invalid_api_key' },
	status: 401,
});
mock.on({ userMessage: 'torn' }, { content: 'This answer is torn in the middle of its stream.' },
	{ chunkSize: 4, truncateAfterChunks: 9, latency: 20 });

await mock.start();
console.log(`port=${new URL(mock.url).port}`);
process.stdin.on('end', () => mock.stop().then(() => process.exit(0)));
process.stdin.resume();
