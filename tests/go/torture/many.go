package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
)

// handshakes under way at once: more than a listener's queue would be dropped and sent again a second later.
const handshakes = 128

// group runs functions at once and keeps their first error.
type group struct {
	sync.WaitGroup
	once sync.Once
	err  error
}

func (g *group) run(f func() error) {
	g.Add(1)
	go func() {
		defer g.Done()
		if err := f(); err != nil {
			g.once.Do(func() { g.err = err })
		}
	}()
}

func (g *group) wait() error {
	g.Wait()
	return g.err
}

// once makes an exchange whose sizes and seeds are its own, so that answers can not be mixed up unseen.
func once(over connection, own int64) error {
	ctx, cancel := context.WithTimeout(context.Background(), stuck)
	defer cancel()
	// Every seventh sends nothing.
	w := wanted{body: whole(1+own%3001, own+1), up: whole(own%7*100, own), length: own%2 == 0}
	return exchanged(ctx, over, w, unwatched)
}

// crowd opens connections and streams on each. When all of them stand, each in the middle of an exchange, they go on to
// its end and make more.
func crowd(o options) error {
	var all, open group
	opening := make(chan struct{}, handshakes)
	goOn := make(chan struct{})
	for kind, p := range o.protocols {
		for number := 0; number < o.connections; number++ {
			p, number := p, kind*o.connections+number
			open.Add(o.streams)
			all.run(func() error {
				opening <- struct{}{}
				over, err := p.connect()
				if err == nil {
					err = once(over, int64(number))
				}
				<-opening
				if err != nil {
					return err
				}
				defer over.Close()
				var streams group
				for stream := 0; stream < o.streams; stream++ {
					own := int64(number*o.streams+stream) * 1000
					streams.run(func() error { return stand(over, own, &open, goOn, o.requests) })
				}
				return streams.wait()
			})
		}
	}
	standing := make(chan struct{})
	go func() {
		open.Wait()
		close(standing)
	}()
	failed := make(chan error)
	go func() { failed <- all.wait() }()
	select {
	case <-standing:
		say("open %d", len(o.protocols)*o.connections*o.streams)
	case err := <-failed:
		return fmt.Errorf("before all stood: %w", err)
	}
	if o.until != "" {
		appears(o.until)
	}
	close(goOn)
	if err := <-failed; err != nil {
		return err
	}
	say("answered %d", len(o.protocols)*o.connections*o.streams*o.requests)
	return nil
}

// stand begins an exchange, waits in its middle for the others, and ends it; then more.
func stand(over connection, own int64, open *group, goOn <-chan struct{}, requests int) error {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	w := wanted{body: whole(1, own), up: whole(2, own)}
	call, err := over.begin(ctx, w)
	if err != nil {
		open.Done()
		return err
	}
	first := make([]byte, 1)
	_, err = io.ReadFull(call, first)
	open.Done()
	if err != nil {
		return fmt.Errorf("the first byte: %w", err)
	}
	<-goOn
	if err := send(call, w.up, unnoted); err != nil {
		return err
	}
	if err := take(io.MultiReader(bytes.NewReader(first), call), w.body, unnoted); err != nil {
		return err
	}
	if call.Taken() != "2" {
		return wrong("%s bytes were taken of 2", call.Taken())
	}
	for request := 1; request < requests; request++ {
		if err := once(over, own+int64(request)); err != nil {
			return err
		}
	}
	return nil
}

// churn opens connections, makes exchanges on each, streams at once, and closes it.
func churn(o options) error {
	var all group
	var begun int64 = -1
	for worker := 0; worker < o.parallel; worker++ {
		all.run(func() error {
			for {
				turn := atomic.AddInt64(&begun, 1)
				if turn >= int64(o.connections) {
					return nil
				}
				over, err := o.protocols[turn%int64(len(o.protocols))].connect()
				if err != nil {
					return err
				}
				var streams group
				for stream := 0; stream < o.streams; stream++ {
					own := turn*int64(o.streams) + int64(stream)
					streams.run(func() error {
						for request := 0; request < o.requests; request++ {
							if err := once(over, own+int64(request)); err != nil {
								return fmt.Errorf("stream %d: %w", own, err)
							}
						}
						return nil
					})
				}
				err = streams.wait()
				over.Close()
				if err != nil {
					return err
				}
			}
		})
	}
	if err := all.wait(); err != nil {
		return err
	}
	say("closed %d", o.connections*o.streams*o.requests)
	return nil
}
