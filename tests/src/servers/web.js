// A server on Node's http, as its programs write one: bodies in every framing with their digests.
'use strict';
const crypto = require('node:crypto');
const http = require('node:http');

// The same bytes for the same length.
function* seeded(length) {
  const block = crypto.createHash('sha512').update(String(length)).digest();
  const part = Buffer.alloc(65536, block);
  for (let left = length; left > 0; left -= part.length) {
    yield left < part.length ? part.subarray(0, left) : part;
  }
}

async function bytesOf(url, response) {
  const n = Number(url.searchParams.get('n'));
  const digest = crypto.createHash('sha256');
  if (url.searchParams.get('length') === '1') {
    response.setHeader('Content-Length', n);
  } else {
    response.setHeader('Trailer', 'X-Digest');
  }
  for (const part of seeded(n)) {
    digest.update(part);
    if (!response.write(part)) {
      await new Promise((resolve) => response.once('drain', resolve));
    }
  }
  if (url.searchParams.get('length') !== '1') {
    response.addTrailers({ 'X-Digest': digest.digest('hex') });
  }
  response.end();
}

async function digest(request, response) {
  const sum = crypto.createHash('sha256');
  let n = 0;
  for await (const part of request) {
    sum.update(part);
    n += part.length;
  }
  const length = request.headers['content-length'] ?? '-1';
  const trailer = request.trailers['x-digest'] ?? '';
  response.end(`${sum.digest('hex')} ${n} ${length} ${trailer}\n`);
}

http.createServer((request, response) => {
  const url = new URL(request.url, 'http://web');
  switch (url.pathname) {
    case '/bytes': return bytesOf(url, response);
    case '/digest': return digest(request, response);
    case '/hinted':
      response.writeEarlyHints({ link: '</style.css>; rel=preload' });
      return response.end('hinted\n');
    default: return response.end('hello\n');
  }
}).listen(Number(process.argv[2]), '::');
