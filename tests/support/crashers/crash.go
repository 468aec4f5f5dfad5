// Faults in crashHere, called by a closure, with goroutines that wait.
package main

type holder struct{ at *int }

//go:noinline
func (one *holder) crashHere() int {
	before := *one.at
	*one.at = before + 1
	return before
}

//go:noinline
func call(one func() int) int { return one() }

func main() {
	for i := 0; i < 100; i++ {
		go func() { select {} }()
	}
	nothing := &holder{}
	call(func() int { return nothing.crashHere() + 1 })
}
