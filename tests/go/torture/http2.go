package main

import (
	"context"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strconv"

	"golang.org/x/net/http2"
)

const (
	// serverStreams are more than an agent opens on one connection.
	serverStreams = 1000
	// serverWindow of a connection holds what serverStream exchanges that nobody takes may send.
	serverWindow, serverStream = 64 << 20, 256 << 10
)

// serveHTTP2 answers calls by prior knowledge until it is killed.
func serveHTTP2(port string) error {
	listener, err := net.Listen("tcp", ":"+port)
	if err != nil {
		return err
	}
	server := &http2.Server{
		MaxConcurrentStreams:         serverStreams,
		MaxUploadBufferPerConnection: serverWindow,
		MaxUploadBufferPerStream:     serverStream,
	}
	quiet := &http.Server{ErrorLog: log.New(io.Discard, "", 0)}
	options := &http2.ServeConnOpts{Handler: http.HandlerFunc(answer), BaseConfig: quiet}
	for {
		socket, err := listener.Accept()
		if err != nil {
			return err
		}
		go server.ServeConn(socket, options)
	}
}

// flushed passes each write on at once.
type flushed struct{ http.ResponseWriter }

func (f flushed) Write(part []byte) (int, error) {
	n, err := f.ResponseWriter.Write(part)
	if err == nil {
		f.ResponseWriter.(http.Flusher).Flush()
	}
	return n, err
}

func answer(w http.ResponseWriter, r *http.Request) {
	asked, err := parse(r.URL.RawQuery)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if asked.length {
		w.Header().Set("Content-Length", strconv.FormatInt(asked.bytes, 10))
	}
	w.Header().Set("Trailer", "X-Taken")
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush()
	if err := both(r.Context(), asked, flushed{w}, r.Body); err != nil {
		// RST_STREAM: what is not whole has no end.
		panic(http.ErrAbortHandler)
	}
	w.Header().Set("X-Taken", strconv.FormatInt(asked.up.bytes, 10))
}

// both gives what is asked and takes what comes. Only if all was in order is there no error.
func both(ctx context.Context, asked wanted, to io.Writer, from io.Reader) error {
	if asked.lazy {
		if err := gives(ctx, asked, to); err != nil {
			return err
		}
		return takes(from, asked.up)
	}
	took := make(chan error, 1)
	go func() { took <- takes(from, asked.up) }()
	if err := gives(ctx, asked, to); err != nil {
		return err
	}
	return <-took
}

// gives ends without an error when the whole body was given. One that is told to stop stands until its caller is gone.
func gives(ctx context.Context, asked wanted, to io.Writer) error {
	err := give(to, asked.body, unnoted)
	if err == errStopped && !asked.reset {
		<-ctx.Done()
	}
	return err
}

func takes(from io.Reader, up body) error {
	err := take(from, up, unnoted)
	if _, mistaken := err.(mistake); mistaken {
		say("UPLOAD WRONG: %v", err)
	} else if err != nil {
		say("upload cut: %v", err)
	}
	return err
}

// clientHTTP2 is one connection of a caller.
type clientHTTP2 struct {
	*http2.ClientConn
	to string
}

func dialHTTP2(to string) (connection, error) {
	socket, err := net.DialTimeout("tcp", to, stuck)
	if err != nil {
		return nil, err
	}
	transport := &http2.Transport{AllowHTTP: true, DisableCompression: true}
	client, err := transport.NewClientConn(socket)
	if err != nil {
		socket.Close()
		return nil, err
	}
	return &clientHTTP2{client, to}, nil
}

type callHTTP2 struct {
	*http.Response
	up *io.PipeWriter
}

func (c *clientHTTP2) begin(ctx context.Context, w wanted) (exchange, error) {
	method, call := http.MethodGet, &callHTTP2{}
	var from io.Reader
	if w.up.bytes > 0 {
		method = http.MethodPost
		from, call.up = io.Pipe()
	}
	request, err := http.NewRequestWithContext(ctx, method, "http://"+c.to+"/give?"+w.query(), from)
	if err != nil {
		return nil, err
	}
	request.ContentLength = 0
	if w.up.bytes > 0 {
		request.ContentLength = -1
		if w.length {
			request.ContentLength = w.up.bytes
		}
	}
	if call.Response, err = c.RoundTrip(request); err != nil {
		return nil, err
	}
	// The mesh answers in the app's place.
	if reason := call.Header.Get("X-Meshwork-Reason"); reason != "" {
		return nil, fmt.Errorf("refused: %s", reason)
	}
	if call.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("status %d", call.StatusCode)
	}
	return call, nil
}

func (c *callHTTP2) Write(part []byte) (int, error) { return c.up.Write(part) }
func (c *callHTTP2) CloseWrite() error              { return c.up.Close() }
func (c *callHTTP2) Read(part []byte) (int, error)  { return c.Body.Read(part) }
func (c *callHTTP2) Taken() string                  { return c.Trailer.Get("X-Taken") }
