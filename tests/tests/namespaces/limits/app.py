# The app of these tests: an echo at ECHO, HTTP at HTTP. `/wait/X` is answered when the file X is there.
import os, socket, threading, time

# A line at once: threads say theirs at the same time.
def say(line): print(line + "\n", end="", flush=True)

def echo(c):
    try:
        while True:
            data = c.recv(65536)
            if not data: break
            c.sendall(data)
    except OSError: pass
    c.close()

def http(c):
    lines = c.makefile("rb")
    try:
        while True:
            method, _, rest = lines.readline().decode().partition(" ")
            if not rest: break
            path = rest.split(" ")[0]
            while lines.readline() not in (b"\r\n", b""): pass
            say(method + " " + path)
            if path.startswith("/wait/"):
                while not os.path.exists(os.environ["DIR"] + path[5:]): time.sleep(0.01)
            body = os.environ["NAME"].encode() + b"\n"
            c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            say("answered " + path)
    except OSError: say("cut")
    c.close()

def serve(port, what):
    listener = socket.create_server(("0.0.0.0", port), backlog=512)
    while True: threading.Thread(target=what, args=(listener.accept()[0],), daemon=True).start()

threading.Thread(target=serve, args=(int(os.environ["ECHO"]), echo)).start()
serve(int(os.environ["HTTP"]), http)
