# Both ends of HTTP/2 connections, by a second implementation (python3-h2). What the tests put below uses them.
import os, socket, struct, sys, threading, time
import h2.config, h2.connection, h2.events as ev, h2.settings, hpack
from h2.settings import SettingCodes, Settings

# Told to go, this library would hear nothing more; the protocol lets streams finish.
Machine = h2.connection.H2ConnectionStateMachine
for state in (h2.connection.ConnectionState.CLIENT_OPEN, h2.connection.ConnectionState.SERVER_OPEN):
    Machine._transitions[(state, h2.connection.ConnectionInputs.RECV_GOAWAY)] = (None, state)

PREFACE = b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n'
VIP = ('h2.shop.mesh.internal', 8080)

class Conn:
    def __init__(self, sock, client, settings=None):
        self.sock = sock
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        config = h2.config.H2Configuration(client_side=client, header_encoding=None,
            validate_inbound_headers=False, validate_outbound_headers=False, normalize_outbound_headers=False)
        self.h2 = h2.connection.H2Connection(config)
        if settings:
            self.h2.local_settings = Settings(client=client, initial_values=settings)
        self.h2.initiate_connection()
        self.flush()

    def flush(self):
        # Who closed already has said why; it is read next.
        try: self.sock.sendall(self.h2.data_to_send())
        except (BrokenPipeError, ConnectionResetError): pass

    def events(self):
        while True:
            try: data = self.sock.recv(65536)
            except ConnectionResetError: return
            if not data: return
            for event in self.h2.receive_data(data):
                if isinstance(event, ev.DataReceived):
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                yield event
            self.flush()

def dial():
    sock = socket.create_connection(VIP, 30)
    sock.settimeout(30)
    return sock

class Client(Conn):
    def __init__(self):
        super().__init__(dial(), True)

    def open(self, path, method='GET', more=(), end=True):
        stream = self.h2.get_next_available_stream_id()
        head = [(':method', method), (':scheme', 'http'), (':authority', 'h2.shop'), (':path', path)]
        self.h2.send_headers(stream, head + list(more), end_stream=end)
        self.flush()
        return stream

    # What comes on `stream` until `last` is true of an event: head, data, interim heads, trailers, and how it ended.
    def read(self, stream, last=None):
        status, data, interim, trailers = None, b'', [], {}
        for event in self.events():
            if getattr(event, 'stream_id', None) != stream:
                if isinstance(event, ev.ConnectionTerminated):
                    self.goaway = event.error_code
                continue
            if isinstance(event, ev.InformationalResponseReceived):
                interim.append({k.decode(): v.decode() for k, v in event.headers})
            if isinstance(event, ev.ResponseReceived):
                status = {k.decode(): v.decode() for k, v in event.headers}
            if isinstance(event, ev.DataReceived): data += event.data
            if isinstance(event, ev.TrailersReceived):
                trailers = {k.decode(): v.decode() for k, v in event.headers}
            if isinstance(event, ev.StreamEnded):
                self.flush()
                return status, data, interim, trailers, 'end'
            if isinstance(event, ev.StreamReset):
                self.flush()
                return status, data, interim, trailers, int(event.error_code)
            if last and last(event):
                self.flush()
                return status, data, interim, trailers, None
        return status, data, interim, trailers, 'closed'

    def get(self, path, **more):
        return self.read(self.open(path, **more))

class Server(Conn):
    count = 0

    def __init__(self, sock):
        self.number = 0
        self.tunnels = set()
        super().__init__(sock, False, {SettingCodes.ENABLE_CONNECT_PROTOCOL: 1,
            SettingCodes.MAX_CONCURRENT_STREAMS: int(os.environ.get('STREAMS', 100))})

    def run(self):
        try:
            for event in self.events():
                if isinstance(event, ev.RequestReceived): self.request(event)
                if isinstance(event, ev.DataReceived) and event.stream_id in self.tunnels:
                    self.h2.send_data(event.stream_id, event.data.upper())
                if isinstance(event, ev.StreamEnded) and event.stream_id in self.tunnels:
                    self.h2.end_stream(event.stream_id)
                if isinstance(event, ev.StreamReset):
                    print('reset', int(event.error_code), flush=True)
        except (OSError, h2.exceptions.ProtocolError) as error:
            print('connection', self.number, repr(error), flush=True)

    def answer(self, stream, text, more=(), end=True, status=200):
        self.h2.send_headers(stream, [(':status', str(status))] + list(more))
        self.h2.send_data(stream, text.encode(), end_stream=end)

    def request(self, event):
        stream = event.stream_id
        # Checks of health ask for nothing.
        if not self.number:
            Server.count += 1
            self.number = Server.count
        head = {k.decode(): v.decode() for k, v in event.headers}
        what, _, value = head.get(':path', '').lstrip('/').partition('/')
        print('request %s\n' % what, end='', flush=True)
        if head.get(':protocol') or head[':method'] == 'CONNECT':
            self.tunnels.add(stream)
            said = head.get(':protocol', head[':authority'])
            self.h2.send_headers(stream, [(':status', '200'), ('x-said', said)])
        elif what == 'hints':
            self.h2.send_headers(stream, [(':status', '103'), ('link', '</a>')])
            self.h2.send_headers(stream, [(':status', '103'), ('link', '</b>')])
            self.answer(stream, 'done')
        elif what == 'trailers':
            self.answer(stream, 'x', end=False)
            self.h2.send_headers(stream, [('x-sum', '7'), ('x-meshwork-reason', 'forged')], end_stream=True)
        elif what == 'fields':
            never = [k.decode() for k, v in [(f[0], f) for f in event.headers]
                     if isinstance(v, hpack.NeverIndexedHeaderTuple)]
            ours = ['%s=%s' % (k.decode(), v.decode()) for k, v in event.headers if b'meshwork' in k]
            notes = [v.decode() for k, v in event.headers if k == b'x-note']
            self.answer(stream, 'never=%s ours=%s notes=%s' % (','.join(never), ','.join(ours), ','.join(notes)),
                        [('x-meshwork-reason', 'forged'), ('x-a', '1'), ('x-a', '2')])
        elif what == 'early':
            self.h2.reset_stream(stream, int(value))
        elif what == 'late':
            self.answer(stream, 'part', end=False)
            self.flush()
            self.h2.reset_stream(stream, int(value))
        elif what == 'wait':
            self.answer(stream, 'begun', end=False)
        elif what == 'number':
            self.answer(stream, '%s %d' % (os.environ.get('NAME', ''), self.number))
        elif what == 'leave':
            self.answer(stream, 'bye')
            self.flush()
            self.h2.close_connection(0, last_stream_id=stream)
        elif what == 'refuse':
            first = not hasattr(Server, 'refused')
            Server.refused = True
            if first: self.h2.reset_stream(stream, 7)
            else: self.answer(stream, 'second')
        elif what == 'flood':
            self.flush()
            for _ in range(200): self.sock.sendall(frame(6, 0, 0, b'12345678') * 50)
        elif what == 'interims':
            for _ in range(20000):
                self.h2.send_headers(stream, [(':status', '103')])
                self.flush()
        else:
            self.answer(stream, 'hello')

def serve():
    listener = socket.create_server(('0.0.0.0', 8080))
    while True:
        sock = listener.accept()[0]
        threading.Thread(target=lambda sock=sock: Server(sock).run(), daemon=True).start()

def frame(kind, flags, stream, payload=b''):
    return struct.pack('>I', len(payload))[1:] + bytes([kind, flags]) + struct.pack('>I', stream) + payload

HEAD = [(':method', 'POST'), (':scheme', 'http'), (':authority', 'h2.shop'), (':path', '/wait')]

# Sends raw frames to the end, and says with which code the connection is ended.
def flood(pieces):
    sock = dial()
    def write():
        try:
            sock.sendall(PREFACE + frame(4, 0, 0))
            for piece in pieces(): sock.sendall(piece)
        except OSError: pass
    threading.Thread(target=write, daemon=True).start()
    buffer = b''
    code = 'none'
    try:
        while True:
            data = sock.recv(65536)
            if not data: break
            buffer += data
            while len(buffer) >= 9:
                length = int.from_bytes(buffer[:3], 'big')
                if len(buffer) < 9 + length: break
                if buffer[3] == 7: code = int.from_bytes(buffer[13:17], 'big')
                buffer = buffer[9 + length:]
    except ConnectionResetError: pass
    print('ended by', code)
