package main

import (
	"context"
	"fmt"
	"sync/atomic"
)

const (
	// bulks at once on the connection whose small calls are counted.
	bulks = 2
	// mixedConnections of each protocol, each with mixedStreams, closed after mixedExchanges.
	mixedConnections, mixedStreams, mixedExchanges = 6, 4, 50
	// largeEvery so many exchanges one is large.
	largeEvery, large, small = 50, 4 << 20, 3000
)

// fair makes bulk transfers both ways, and small calls on the same connection until the first of them is through. It
// says how many of these were answered meanwhile.
func fair(o options) error {
	for _, p := range o.protocols {
		over, err := p.connect()
		if err != nil {
			return err
		}
		var flowing int64
		ended := make(chan error, bulks)
		for number := int64(0); number < bulks; number++ {
			w := wanted{body: whole(o.bytes, number), up: whole(o.bytes, number+bulks)}
			go func() {
				note := func(n int) { atomic.AddInt64(&flowing, int64(n)) }
				ended <- exchanged(context.Background(), over, w, progress{unnoted, note})
			}()
		}
		answered := 0
		for turn := int64(0); len(ended) == 0; turn++ {
			if err := once(over, turn); err != nil {
				return fmt.Errorf("small call %d: %w", turn, err)
			}
			if atomic.LoadInt64(&flowing) > 0 {
				answered++
			}
		}
		for number := 0; number < bulks; number++ {
			if err := <-ended; err != nil {
				return err
			}
		}
		over.Close()
		say("answered %s %d", p.name, answered)
	}
	return nil
}

// mixed is a mixture of all that goes well, until the file is there: what a soak runs.
func mixed(o options) error {
	var all group
	var calls, ended int64
	go func() {
		appears(o.until)
		atomic.StoreInt64(&ended, 1)
	}()
	for kind, p := range o.protocols {
		for number := 0; number < mixedConnections; number++ {
			p, words := p, random(o.seed*1000+int64(kind*mixedConnections+number))
			all.run(func() error {
				for atomic.LoadInt64(&ended) == 0 {
					over, err := p.connect()
					if err != nil {
						return err
					}
					var streams group
					for stream := 0; stream < mixedStreams; stream++ {
						words := random(words.next())
						streams.run(func() error { return mix(over, words, &calls, &ended) })
					}
					err = streams.wait()
					over.Close()
					if err != nil {
						return err
					}
				}
				return nil
			})
		}
	}
	if err := all.wait(); err != nil {
		return err
	}
	say("calls %d", calls)
	return nil
}

func mix(over connection, words random, calls, ended *int64) error {
	size := func() int64 {
		if words.below(largeEvery) == 0 {
			return 1 + words.below(large)
		}
		return words.below(small)
	}
	for turn := 0; turn < mixedExchanges && atomic.LoadInt64(ended) == 0; turn++ {
		w := wanted{body: whole(size(), int64(words.next()>>1)), length: words.below(2) == 0}
		if words.below(2) == 0 {
			w.up = whole(size(), int64(words.next()>>1))
		}
		ctx, cancel := context.WithTimeout(context.Background(), stuck)
		err := exchanged(ctx, over, w, unwatched)
		cancel()
		if err != nil {
			return fmt.Errorf("%+v: %w", w, err)
		}
		atomic.AddInt64(calls, 1)
	}
	return nil
}
