package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
)

const (
	// resetStreams exchanges are open at once on each of resetConnections connections of each protocol.
	resetStreams, resetConnections = 12, 2
	// resetBytes are beyond a stream's credit, so that resets also meet senders that wait for it.
	resetBytes = 2 << 20
)

// fault of a drawn exchange.
type fault int

const (
	nobody fault = iota
	// sending: the caller resets when it has sent so much.
	sending
	// getting: the caller resets when it has got so much.
	getting
	// server resets when it has given so much (gRPC: ends it with a status).
	server
)

type plan struct {
	w     wanted
	fault fault
	at    int64
}

func draw(r *random, length bool) plan {
	// Small ones as often as large ones.
	size := func() int64 {
		limit := int64(1) << r.below(22)
		if limit > resetBytes {
			limit = resetBytes
		}
		return 1 + r.below(limit)
	}
	p := plan{
		w: wanted{
			body: whole(size(), int64(r.next()>>1)), up: whole(size(), int64(r.next()>>1)),
			length: length && r.below(2) == 0,
		},
		fault: fault(r.below(4)),
	}
	switch p.fault {
	case sending:
		p.at = r.below(p.w.up.bytes)
	case getting:
		p.at = r.below(p.w.bytes)
	case server:
		p.w.stop, p.w.reset = r.below(p.w.bytes), true
	}
	return p
}

// resets runs exchanges that either end resets in their middle, on connections that the others go on on.
func resets(o options) error {
	var group sync.WaitGroup
	var left, whole, cut int64 = int64(o.times), 0, 0
	failures := make(chan error, len(o.protocols)*resetConnections*resetStreams)
	for kind, p := range o.protocols {
		for number := 0; number < resetConnections; number++ {
			over, err := p.connect()
			if err != nil {
				return err
			}
			defer over.Close()
			for worker := 0; worker < resetStreams; worker++ {
				group.Add(1)
				words := random(o.seed*1000 + int64((kind*resetConnections+number)*resetStreams+worker))
				go func(p protocol, words random) {
					defer group.Done()
					for atomic.AddInt64(&left, -1) >= 0 {
						plan := draw(&words, p.name == "http2")
						met, err := meet(over, plan)
						if err != nil {
							failures <- fmt.Errorf("%s %+v: %w", p.name, plan, err)
							return
						}
						if met {
							atomic.AddInt64(&whole, 1)
						} else {
							atomic.AddInt64(&cut, 1)
						}
					}
				}(p, words)
			}
		}
	}
	group.Wait()
	close(failures)
	if err := <-failures; err != nil {
		return err
	}
	say("whole %d cut %d", whole, cut)
	return nil
}

// meet says whether the exchange came through; what the plan forbids is an error.
func meet(over connection, p plan) (bool, error) {
	ctx, cancel := context.WithTimeout(context.Background(), stuck)
	defer cancel()
	watch := unwatched
	var passed int64
	reached := make(chan struct{})
	count := func(n int) {
		if passed += int64(n); n > 0 && passed > p.at && passed-int64(n) <= p.at {
			close(reached)
		}
	}
	switch p.fault {
	case sending:
		watch.up = count
	case getting:
		watch.down = count
	}
	own, reset := context.WithCancel(ctx)
	defer reset()
	go func() {
		select {
		case <-reached:
			reset()
		case <-own.Done():
		}
	}()
	err := exchanged(own, over, p.w, watch)
	var mistaken mistake
	switch {
	case errors.As(err, &mistaken):
		return false, err
	case ctx.Err() != nil:
		return false, fmt.Errorf("stuck: %w", ctx.Err())
	case p.fault == nobody || err == nil && p.fault != server:
		// The caller's own reset may come too late.
		return err == nil, err
	case err == nil:
		return false, wrong("what the server cut looks whole")
	}
	return false, nil
}
