package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/url"
	"strconv"
	"time"
)

const (
	// step is what one write of a body carries; a gRPC message.
	step = 64 << 10
	// slowStep is the pause of a writer of single bytes: each is a frame of its own.
	slowStep = time.Millisecond
)

// body is what one direction of an exchange carries: made from a seed where it is sent, and compared byte for byte with
// that where it is taken, which says more than a digest and costs less.
type body struct {
	bytes, seed int64
	// stop, unless negative: after so many bytes nothing more comes.
	stop int64
	// slow: one byte at a time.
	slow bool
}

// wanted is what a caller asks of the server.
type wanted struct {
	body
	// up is what the server gets; nothing, where that is no body.
	up body
	// length: the body is announced by its length (HTTP/2 only).
	length bool
	// reset: the server resets the exchange where its body stops.
	reset bool
	// lazy: the server takes nothing before it has given its body.
	lazy bool
}

func whole(bytes, seed int64) body { return body{bytes: bytes, seed: seed, stop: -1} }

func (w wanted) query() string {
	return fmt.Sprintf("bytes=%d&seed=%d&stop=%d&slow=%t&length=%t&reset=%t&lazy=%t&upbytes=%d&upseed=%d",
		w.bytes, w.seed, w.stop, w.slow, w.length, w.reset, w.lazy, w.up.bytes, w.up.seed)
}

func parse(query string) (w wanted, err error) {
	values, err := url.ParseQuery(query)
	number := func(name string) int64 {
		value, wrong := strconv.ParseInt(values.Get(name), 10, 64)
		if wrong != nil {
			err = wrong
		}
		return value
	}
	w.up.bytes, w.up.seed = number("upbytes"), number("upseed")
	is := func(name string) bool { return values.Get(name) == "true" }
	w.bytes, w.seed, w.stop = number("bytes"), number("seed"), number("stop")
	w.slow, w.length, w.reset, w.lazy = is("slow"), is("length"), is("reset"), is("lazy")
	return w, err
}

// random is splitmix64: words of a seed, faster than they are digested.
type random uint64

func (r *random) next() uint64 {
	*r += 0x9e3779b97f4a7c15
	z := uint64(*r)
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

func (r *random) below(n int64) int64 { return int64(r.next()>>1) % n }

func (r *random) fill(part []byte) {
	for len(part) >= 8 {
		binary.LittleEndian.PutUint64(part, r.next())
		part = part[8:]
	}
	if len(part) > 0 {
		var last [8]byte
		binary.LittleEndian.PutUint64(last[:], r.next())
		copy(part, last[:])
	}
}

// errStopped: the body stopped where it was told to, and its message is unfinished.
var errStopped = errors.New("the body stops here")

// give sends a body; noted is told how far it is.
func give(to io.Writer, b body, noted func(int)) error {
	words, sent := random(b.seed), int64(0)
	part := make([]byte, step)
	for sent < b.bytes {
		left := b.bytes - sent
		if b.stop >= 0 && b.stop-sent < left {
			left = b.stop - sent
		}
		if left == 0 {
			return errStopped
		}
		if left < int64(len(part)) {
			part = part[:left]
		}
		words.fill(part)
		pieces := [][]byte{part}
		if b.slow {
			pieces = pieces[:0]
			for at := range part {
				pieces = append(pieces, part[at:at+1])
			}
		}
		for _, piece := range pieces {
			if _, err := to.Write(piece); err != nil {
				return err
			}
			sent += int64(len(piece))
			noted(len(piece))
			if b.slow {
				time.Sleep(slowStep)
			}
		}
	}
	if b.stop == b.bytes {
		return errStopped
	}
	return nil
}

// take reads until the end. What is not b is a mistake: another byte, one too many, an end too early.
func take(from io.Reader, b body, noted func(int)) error {
	words, taken := random(b.seed), int64(0)
	part, expected, rest := make([]byte, step), make([]byte, step), []byte(nil)
	for {
		n, err := from.Read(part)
		for got := part[:n]; len(got) > 0; {
			if len(rest) == 0 {
				words.fill(expected)
				rest = expected
			}
			same := len(got)
			if len(rest) < same {
				same = len(rest)
			}
			if taken+int64(same) > b.bytes {
				return wrong("%d bytes or more, not %d", taken+int64(same), b.bytes)
			}
			if !bytes.Equal(got[:same], rest[:same]) {
				return wrong("not seed %d in %d bytes from %d on", b.seed, same, taken)
			}
			got, rest, taken = got[same:], rest[same:], taken+int64(same)
		}
		noted(n)
		if err == io.EOF {
			if taken != b.bytes {
				return wrong("an end after %d of %d bytes", taken, b.bytes)
			}
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func unnoted(int) {}

// exchange is a call under way: what is written goes up, what is read comes down.
type exchange interface {
	io.ReadWriter
	// CloseWrite says that all was written.
	CloseWrite() error
	// Taken is what the server took of it; known when Read has said io.EOF.
	Taken() string
}

// connection carries exchanges, any number at once.
type connection interface {
	// begin asks for a body. Without one to be sent the call says at once that nothing comes. Ending ctx resets the
	// exchange.
	begin(ctx context.Context, w wanted) (exchange, error)
	io.Closer
}

// progress of both directions of an exchange.
type progress struct{ up, down func(int) }

var unwatched = progress{unnoted, unnoted}

// exchanged makes an exchange in which all that is sent and taken is checked, both ways at once.
func exchanged(ctx context.Context, over connection, w wanted, p progress) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	call, err := over.begin(ctx, w)
	if err != nil {
		return err
	}
	given := make(chan error, 1)
	go func() { given <- send(call, w.up, p.up) }()
	if err := take(call, w.body, p.down); err != nil {
		return err
	}
	// The answer's end is behind ours: the server says there what it took.
	if err := <-given; err != nil {
		return err
	}
	if taken := call.Taken(); taken != strconv.FormatInt(w.up.bytes, 10) {
		return wrong("%s bytes were taken of %d", taken, w.up.bytes)
	}
	return nil
}

func send(call exchange, up body, noted func(int)) error {
	if up.bytes == 0 {
		return nil
	}
	if err := give(call, up, noted); err != nil {
		return err
	}
	return call.CloseWrite()
}

// mistake is what the mesh must never do, in contrast to a call that failed.
type mistake string

func (m mistake) Error() string { return string(m) }

func wrong(format string, values ...any) error { return mistake(fmt.Sprintf(format, values...)) }
