// The third reader of HTTP/1: llhttp in Node, over streams in memory. Each line of the input is a kind (`requests`, or the
// method of a request that is answered) and bytes in base64; each line of the output says what was read, as JSON whose
// strings are bytes.
'use strict';
const http = require('node:http');
const { Duplex } = require('node:stream');
const { createInterface } = require('node:readline');

const turn = () => new Promise(setImmediate);

// Bytes, then the end; nothing comes before `asked`, if that is waited for.
function carrier(bytes, waits) {
  const stream = new Duplex({
    allowHalfOpen: true,
    read() {},
    write(_chunk, _encoding, done) {
      if (waits) {
        waits = false;
        stream.push(bytes);
      }
      done();
    },
  });
  for (const name of ['setTimeout', 'setNoDelay', 'setKeepAlive', 'ref', 'unref']) stream[name] = () => stream;
  stream.on('error', () => {});
  if (!waits) stream.push(bytes);
  return stream;
}

function collect(message, line, seen) {
  const read = { line, headers: message.rawHeaders, body: '', whole: false, message };
  seen.push(read);
  message.on('data', (chunk) => { read.body += chunk.toString('latin1'); });
  message.on('end', () => { read.whole = message.complete; });
  message.on('error', () => {});
}

let seen = [];
const server = http.createServer({ connectionsCheckingInterval: 1 << 30 });
server.httpAllowHalfOpen = true;
const answer = (request, response) => {
  collect(request, [request.method, request.url], seen);
  request.on('end', () => response.end());
};
server.on('request', answer);
server.on('checkContinue', answer);
server.on('checkExpectation', answer);
// What was whole before an error is still answered; behind it Node reads nothing.
server.on('clientError', () => {});
// What follows is the tunnel's: no body, and nothing that Node reads.
server.on('connect', (request, socket, head) => {
  seen.push({ line: [request.method, request.url], headers: request.rawHeaders, body: head.toString('latin1'), whole: true });
  socket.destroy();
});

async function requests(bytes) {
  const stream = carrier(bytes, false);
  server.emit('connection', stream);
  await turn();
  await turn();
  stream.push(null);
  await turn();
  await turn();
  stream.destroy();
}

async function response(bytes, method) {
  const stream = carrier(bytes, true);
  const options = { method, path: method === 'CONNECT' ? 'a:443' : '/', headers: { host: 'a' }, createConnection: () => stream };
  const request = http.request(options);
  const tunnel = (message) => seen.push({ line: [String(message.statusCode)], headers: message.rawHeaders, body: '', whole: true });
  request.on('response', (message) => collect(message, [String(message.statusCode)], seen));
  request.on('connect', tunnel);
  request.on('upgrade', tunnel);
  request.on('error', () => {});
  request.end();
  await turn();
  await turn();
  stream.push(null);
  await turn();
  await turn();
  stream.destroy();
  request.destroy();
}

async function main() {
  for await (const line of createInterface({ input: process.stdin })) {
    const [kind, text] = line.split(' ');
    const bytes = Buffer.from(text, 'base64');
    seen = [];
    await (kind === 'requests' ? requests(bytes) : response(bytes, kind));
    const shown = seen.map(({ line, headers, body, whole }) => ({ line, headers, body, whole }));
    process.stdout.write(`${JSON.stringify(shown)}\n`);
  }
  process.exit(0);
}
main();
