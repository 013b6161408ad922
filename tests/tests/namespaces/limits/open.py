# A program with one open connection, on which it goes on when the file GO is there.
import os, socket, time
try:
    c = socket.create_connection((os.environ["TO"], int(os.environ["PORT"])), 20)
    c.settimeout(60)
    def exchange(word):
        c.sendall(word)
        got = b""
        while len(got) < len(word):
            data = c.recv(100)
            if not data: raise EOFError
            got += data
        assert got == word, got
    exchange(b"hello")
    print("open", flush=True)
    if "GO" in os.environ:
        while not os.path.exists(os.environ["GO"]): time.sleep(0.01)
        exchange(b"still here")
        c.shutdown(socket.SHUT_WR)
        assert c.recv(1) == b""
        print("went on to its end", flush=True)
except (OSError, EOFError) as error: print(type(error).__name__, flush=True)
