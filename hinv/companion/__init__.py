"""What the notebooks need, and the library does not: it is never imported from outside this room.

`data`       labelled images
`training`   runs that can be killed and resumed
`checks`     claims: measured, compared, written to results/
`figures`    one style, one function per role
`peers`      the same questions to other libraries
`explorer`   a network picked, its curvature shown: notebook 13
`demo`       what `make demo` runs
`front`      the animated elimination, the social picture
`bench`      speed and memory figures
`reproduce`  what `make reproduce` calls; `report` its table of claims
`book`       what `make book` calls
"""
