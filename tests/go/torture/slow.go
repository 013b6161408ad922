package main

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"
)

const (
	// slowStreams of each kind on one connection.
	slowStreams = 10
	// lazyBytes are more than all windows between hold of a stream that nobody takes.
	lazyBytes = 8 << 20
	// slowBytes are written one by one.
	slowBytes = 1000
	// smallCalls must get through beside them.
	smallCalls = 300
)

// slow has on one connection of each protocol: callers that do not read, callers whose server does not read, and
// both ends writing single bytes. Small calls on the same connection go on; what stood ends whole when the file is
// there.
func slow(o options) error {
	var standing group
	until := make(chan struct{})
	var begun int64
	var connections []connection
	for _, p := range o.protocols {
		over, err := p.connect()
		if err != nil {
			return err
		}
		defer over.Close()
		connections = append(connections, over)
		for number := int64(0); number < slowStreams; number++ {
			down := wanted{body: whole(lazyBytes, number)}
			lazy := wanted{body: whole(lazyBytes, number), up: whole(lazyBytes, number+1), lazy: true}
			single := body{bytes: slowBytes, seed: number, stop: -1, slow: true}
			standing.run(func() error { return unread(over, down, &begun, until) })
			standing.run(func() error { return unread(over, lazy, &begun, until) })
			standing.run(func() error {
				return exchanged(context.Background(), over, wanted{body: single, up: single}, unwatched)
			})
		}
	}
	deadline := time.Now().Add(stuck)
	for all := int64(2 * slowStreams * len(connections)); atomic.LoadInt64(&begun) < all; time.Sleep(lookEvery) {
		if time.Now().After(deadline) {
			return fmt.Errorf("%d of %d stand: stuck", atomic.LoadInt64(&begun), all)
		}
	}
	for turn := int64(0); turn < smallCalls; turn++ {
		for _, over := range connections {
			if err := once(over, turn); err != nil {
				return fmt.Errorf("small call %d: %w", turn, err)
			}
		}
	}
	say("answered %d", smallCalls*len(connections))
	appears(o.until)
	close(until)
	if err := standing.wait(); err != nil {
		return err
	}
	say("whole %d", 3*slowStreams*len(connections))
	return nil
}

// unread asks for a body and reads no more than its first bytes until it may. A lazy server takes nothing before it has
// given it, so both directions stand.
func unread(over connection, w wanted, begun *int64, until <-chan struct{}) error {
	first := true
	down := func(n int) {
		if first && n > 0 {
			first = false
			atomic.AddInt64(begun, 1)
			<-until
		}
	}
	return exchanged(context.Background(), over, w, progress{unnoted, down})
}
